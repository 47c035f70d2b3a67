//! Page tables: mostly what an engine would write, with some entries replaced.

use arbitrary::{Arbitrary, Result, Unstructured};

#[derive(Debug)]
pub struct Tables {
    pub page_size: usize,
    pub qo_indptr: Vec<u32>,
    pub indptr: Vec<u32>,
    pub indices: Vec<u32>,
    pub last_page_len: Vec<u32>,
    pub candidates: Option<Vec<(u32, u32)>>,
    pub sequence_indices: Option<Vec<u32>>,
}

impl<'a> Arbitrary<'a> for Tables {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let mut tables = Tables {
            page_size: [1, 2, 3, 8, 16, 64][input.choose_index(6)?],
            qo_indptr: vec![0],
            indptr: vec![0],
            indices: Vec::new(),
            last_page_len: Vec::new(),
            candidates: input.ratio(1, 3)?.then(Vec::new),
            sequence_indices: input.ratio(1, 2)?.then(Vec::new),
        };
        for row in 0..input.int_in_range(0..=6)? {
            tables.add_row(row, input)?;
        }
        for _ in 0..input.int_in_range(0..=3)? {
            tables.damage(input)?;
        }
        Ok(tables)
    }
}

impl Tables {
    fn add_row(&mut self, row: u32, input: &mut Unstructured<'_>) -> Result<()> {
        let num_pages: u32 = input.int_in_range(0..=5)?;
        for _ in 0..num_pages {
            self.indices.push(input.int_in_range(0..=15)?);
        }
        self.indptr.push(self.indices.len() as u32);
        let last = if num_pages == 0 { 0 } else { input.int_in_range(1..=self.page_size as u32)? };
        self.last_page_len.push(last);
        let len = num_pages.saturating_sub(1) * self.page_size as u32 + last;
        let block = if input.ratio(1, 2)? { len.min(1) } else { input.int_in_range(0..=len.min(20))? };
        self.qo_indptr.push(self.qo_indptr[row as usize] + block);
        if let Some(candidates) = &mut self.candidates {
            let begin = input.int_in_range(0..=len)?;
            candidates.push((begin, input.int_in_range(begin..=len)?));
        }
        if let Some(indices) = &mut self.sequence_indices {
            indices.push(row);
        }
        Ok(())
    }

    /// Replaces, adds or drops an entry somewhere.
    fn damage(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let entry = if input.ratio(1, 2)? { input.arbitrary()? } else { input.int_in_range(0..=40)? };
        let mut bounds: Vec<u32> = Vec::new();
        let mut none = Vec::new();
        let table = match input.int_in_range(0..=6)? {
            0 => &mut self.qo_indptr,
            1 => &mut self.indptr,
            2 => &mut self.indices,
            3 => &mut self.last_page_len,
            4 => self.sequence_indices.as_mut().unwrap_or(&mut none),
            5 => {
                let candidates = self.candidates.iter().flatten();
                bounds.extend(candidates.flat_map(|&(begin, end)| [begin, end]));
                &mut bounds
            }
            _ => {
                self.page_size = entry as usize;
                return Ok(());
            }
        };
        match input.int_in_range(0..=3)? {
            0 => table.push(entry),
            1 => drop(table.pop()),
            _ if table.is_empty() => {}
            _ => {
                let place = input.choose_index(table.len())?;
                table[place] = entry;
            }
        }
        if !bounds.is_empty() {
            self.candidates = Some(bounds.chunks(2).map(|pair| (pair[0], *pair.last().unwrap())).collect());
        }
        Ok(())
    }
}

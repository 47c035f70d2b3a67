//! Tables of an engine that lie on the device.

use std::sync::Arc;

use tokenselect_kernels::entries::{Entry, Key, Op};
use tokenselect_kernels::ops::translate::{self, TranslateParams};
use tokenselect_kernels::simt::global::{GlobalMut, GlobalPtr};

use super::{Batch, BatchSlot, Bounds};
use crate::driver::Driver;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::TensorView;

/// Page tables of another engine in the device's memory: vLLM's block tables, SGLang's slots of tokens.
///
/// Each table is of 32-bit integers, [`DType::U32`], or of 64-bit ones, [`DType::U64`], signed or not (a negative one, and one of more than
/// 32 bits, is beyond every limit). They are read when the device comes
/// to it, after its earlier work, and the host never looks at them: a row that breaks a rule is left without tokens, and
/// [`BatchSlot::faults`] counts it. Two rows whose blocks lie in one page, or that name one sequence, are not found: what
/// is written there is then one's or the other's.
#[derive(Debug, Clone, Copy)]
pub struct TablesOnDevice<'a> {
    /// `[table_rows, entries]`: pages in token order ([`slots`](Self::slots) unset), or the slot of each token, which is
    /// its page times the page size and its place in the page. Or `[table_rows, 1, entries]`, whose rows may be parts of longer
    /// ones ([`TensorView::strided_from_device_addr`]).
    pub entries: TensorView<'a>,
    /// Whether the entries are slots of tokens.
    pub slots: bool,
    /// `[rows]`: the row of `entries` of each row of the batch. `None`: the row with the same number.
    pub rows: Option<TensorView<'a>>,
    /// `[rows]`: tokens of each row, its block included; at least its block, or 0.
    pub kv_lens: TensorView<'a>,
    /// `[rows]`: the entry of the Selection Cache of each row, all different (`u32::MAX`, or -1, for none). Given exactly if the
    /// slot's batches name sequences.
    pub sequences: Option<TensorView<'a>>,
    /// Pages of the pool. A page number beyond it is a fault, and becomes the last page.
    pub num_pages: usize,
    /// Entries of the Selection Cache. A sequence beyond it is a fault, and becomes none.
    pub num_sequences: usize,
}

/// Types of tables.
const INTEGERS: [DType; 2] = [DType::U32, DType::U64];

impl BatchSlot {
    /// Puts the batch that an engine's tables on the device describe in this place, in the device's order of work, and returns it
    /// bound there. Its rows and blocks are the slot's; lengths and pages are the device's alone. Nothing passes through the
    /// host: it can be recorded, and does its work anew each time.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`] for wrong tensors, [`Error::Table`] where sequences are given
    /// to a slot without them or the other way round, [`Error::Argument`] for no pages, [`Error::Missing`] where the slot
    /// is for parts of sequences.
    pub fn translate(&mut self, tables: &TablesOnDevice<'_>) -> Result<Batch> {
        let params = self.translate_params(tables)?;
        let max_row_pages = params.max_row_pages() as usize;
        let batch = self.like.on_device(Bounds {
            max_kv_len: max_row_pages * self.page_size,
            num_places: self.max_pages.min(self.num_rows() * max_row_pages) * self.page_size,
            num_pages: tables.num_pages,
            num_sequences: tables.num_sequences,
        });
        self.check_needs(&batch)?;
        let driver = Arc::clone(self.memory.slice().driver());
        let entry = translate_entry(&driver)?;
        if params.num_rows > 0 {
            // SAFETY: shapes were checked; the slot's memory has room for the tables of its rows and `max_pages` page numbers.
            unsafe { driver.launch_with(entry, params.dims(), &params)? };
        }
        Ok(self.bind(batch))
    }

    /// How many rows were left without tokens, pages replaced and sequences left out since the slot was made. Waits for earlier
    /// work of the device.
    ///
    /// # Errors
    /// [`Error::Driver`] where the device fails.
    pub fn faults(&self) -> Result<u32> {
        let mut word = [0; 4];
        let all = self.memory.slice();
        all.part(all.len() - 4, all.len()).read(&mut word)?;
        Ok(u32::from_ne_bytes(word))
    }

    fn translate_params(&self, tables: &TablesOnDevice<'_>) -> Result<TranslateParams> {
        let driver = self.memory.slice().driver();
        let rows = self.num_rows();
        let dims = tables.entries.shape();
        let (table_rows, entries, stride) = match *dims.dims() {
            [table_rows, entries] => (table_rows, entries, entries),
            [table_rows, 1, entries] => (table_rows, entries, tables.entries.head_strides()[0]),
            _ => return Err(Error::argument("entries", "two-dimensional", dims)),
        };
        if tables.num_pages == 0 {
            return Err(Error::argument("num_pages", "at least 1", tables.num_pages));
        }
        if self.like.is_partial() {
            return Err(Error::Missing { op: "translate", needs: "a slot for whole sequences" });
        }
        self.expect_given("sequences", self.like.has_sequences(), tables.sequences.is_some())?;
        match dims.dims() {
            [_, _] => tables.entries.expect("entries", &INTEGERS, dims)?,
            // In any strides, of which that of the one head means nothing.
            _ => tables.entries.expect_type("entries", &INTEGERS)?,
        }
        let lens = [Some(("kv_lens", &tables.kv_lens)), tables.rows.as_ref().map(|rows| ("rows", rows))];
        let sequences = tables.sequences.as_ref().map(|sequences| ("sequences", sequences));
        for (what, tensor) in lens.into_iter().flatten().chain(sequences) {
            tensor.expect(what, &INTEGERS, [rows])?;
        }
        let wide = |bit, tensor: Option<&TensorView<'_>>| match tensor {
            Some(tensor) if tensor.dtype() == DType::U64 => bit,
            _ => 0,
        };
        let at = |what, tensor: &TensorView<'_>| pointer(driver, what, tensor);
        let optional = |what, tensor: Option<&TensorView<'_>>| {
            tensor.map_or(Ok(GlobalPtr::from_addr(0)), |tensor| at(what, tensor))
        };
        let own = self.addresses();
        Ok(TranslateParams {
            entries: at("entries", &tables.entries)?,
            rows: optional("rows", tables.rows.as_ref())?,
            kv_lens: at("kv_lens", &tables.kv_lens)?,
            sequences: optional("sequences", tables.sequences.as_ref())?,
            qo_indptr: GlobalPtr::from_addr(own.qo_indptr),
            kv_indptr: GlobalMut::from_addr(own.kv_indptr),
            kv_indices: GlobalMut::from_addr(own.kv_indices),
            last_page_len: GlobalMut::from_addr(own.last_page_len),
            sequence_indices: GlobalMut::from_addr(own.sequence_indices),
            faults: GlobalMut::from_addr(own.faults),
            entry_stride: stride as u64,
            num_entries: saturated(entries),
            num_table_rows: saturated(table_rows),
            num_rows: saturated(rows),
            page_size: saturated(self.page_size),
            slots_per_page: if tables.slots { saturated(self.page_size) } else { 1 },
            num_pages: saturated(tables.num_pages),
            max_pages: saturated(self.max_pages),
            num_sequences: saturated(tables.num_sequences),
            wide: wide(translate::ENTRIES, Some(&tables.entries))
                | wide(translate::ROWS, tables.rows.as_ref())
                | wide(translate::KV_LENS, Some(&tables.kv_lens))
                | wide(translate::SEQUENCES, tables.sequences.as_ref()),
            reserved: 0,
        })
    }
}

/// The kernel.
pub(super) fn translate_entry(driver: &Arc<dyn Driver>) -> Result<&'static Entry> {
    driver.find("translate", Op::Translate, Key::NONE)
}

fn saturated(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Pointer to a table on the driver's device.
fn pointer(driver: &Arc<dyn Driver>, what: &'static str, tensor: &TensorView<'_>) -> Result<GlobalPtr<u32>> {
    let slice = tensor.device_slice(what)?;
    slice.expect_on(driver, what)?;
    if !slice.addr().is_multiple_of(4) {
        return Err(Error::argument(what, "at an address divisible by 4", slice.addr()));
    }
    Ok(GlobalPtr::from_addr(slice.addr()))
}

//! What the tables say of a row.

use super::*;

/// What the tables say of a row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As [`BatchTables::queries`].
    pub queries: Tokens,
    /// As [`BatchTables::first_page`].
    pub first_page: u32,
    /// As [`BatchTables::kv_len`].
    pub kv_len: u32,
}

impl Row {
    /// As [`BatchTables::candidates`] of a whole sequence.
    pub fn candidates(&self, n_init: u32, n_local: u32) -> Tokens {
        let end = self.kv_len.saturating_sub(self.queries.len()).saturating_sub(n_local);
        Tokens { begin: n_init.min(end), end }
    }
}

impl BatchTables {
    /// All of a row at once. The loads are plain ones: the assembler would move `ld.global.nc` behind each other's uses.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[track_caller]
    pub unsafe fn row(&self, row: u32) -> Row {
        let (queries, pages) = (self.qo_indptr.add(row as u64), self.kv_indptr.add(row as u64));
        let queries = Tokens { begin: queries.load(), end: queries.add(1).load() };
        let (first_page, end) = (pages.load(), pages.add(1).load());
        let last_page_len = self.kv_last_page_len.add(row as u64).load();
        let kv_len = (end - first_page).saturating_sub(1) * self.page_size + last_page_len;
        Row { queries, first_page, kv_len }
    }

    /// The queries of a row, as rows of `q` and `out`.
    ///
    /// # Safety
    /// - `row < num_rows`, and the tables are as described.
    #[track_caller]
    pub unsafe fn queries(&self, row: u32) -> Tokens {
        let entry = self.qo_indptr.add(row as u64);
        Tokens { begin: entry.load_constant(), end: entry.add(1).load_constant() }
    }

    /// The row that query `query` belongs to, by bisection.
    ///
    /// # Safety
    /// - `query < qo_indptr[num_rows]`, and the tables are as described.
    #[track_caller]
    pub unsafe fn row_of_query(&self, query: u32) -> u32 {
        let (mut low, mut high) = (0, self.num_rows);
        while low + 1 < high {
            let middle = (low + high) / 2;
            if self.qo_indptr.add(middle as u64).load_constant() <= query {
                low = middle
            } else {
                high = middle
            }
        }
        low
    }

    /// First entry of a row in `kv_indices`.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[track_caller]
    pub unsafe fn first_page(&self, row: u32) -> u32 {
        self.kv_indptr.add(row as u64).load_constant()
    }

    /// `n`: cached tokens of a row.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[track_caller]
    pub unsafe fn kv_len(&self, row: u32) -> u32 {
        let pages = self.kv_indptr.add(row as u64 + 1).load_constant() - self.first_page(row);
        pages.saturating_sub(1) * self.page_size + self.kv_last_page_len.add(row as u64).load_constant()
    }

    /// Whether rows are partial sequences, with candidates of their own.
    pub fn is_partial(&self) -> bool {
        self.candidates.addr() != 0
    }

    /// Index of the row's token 0 in arrays with an entry for every slot of the batch's pages, such as votes.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[track_caller]
    pub unsafe fn token_base(&self, row: u32) -> u64 {
        self.first_page(row) as u64 * self.page_size as u64
    }

    /// First tile of the row's logits: they lie in tiles of [`LOGIT_TILE`] tokens, the first of which begins with token 0.
    /// (One tile more than the tokens need separates a row from the next, since a row need not begin with a tile.)
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[track_caller]
    pub unsafe fn logit_tile(&self, row: u32) -> u64 {
        logit_tile(self.token_base(row), row)
    }

    /// Page of a token, as an index into the row's page table, and the token's index in the page.
    pub fn split_token(&self, token: u32) -> (u32, u32) {
        let page = ((token as u64 * self.page_magic as u64) >> self.page_shift) as u32;
        (page, token - page * self.page_size)
    }

    /// The tokens of a row that compete for the top-k.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries).
    #[track_caller]
    pub unsafe fn candidates(&self, row: u32, n_init: u32, n_local: u32) -> Tokens {
        if self.is_partial() { self.own_candidates(row) } else { self.row(row).candidates(n_init, n_local) }
    }

    /// [`candidates`](Self::candidates) of a row whose tables have been read.
    ///
    /// # Safety
    /// - As for [`queries`](Self::queries); `tables` are those of the row.
    #[track_caller]
    pub unsafe fn candidates_of(&self, row: u32, tables: &Row, n_init: u32, n_local: u32) -> Tokens {
        if self.is_partial() { self.own_candidates(row) } else { tables.candidates(n_init, n_local) }
    }

    /// The candidates of a row that is a partial sequence.
    #[track_caller]
    unsafe fn own_candidates(&self, row: u32) -> Tokens {
        // A product of 32 bits: with one of 64, `score` of a million tokens in pages of one token is 4 % slower
        // (docs/performance.md).
        let entry = self.candidates.add((2 * row) as u64);
        Tokens { begin: entry.load(), end: entry.add(1).load() }
    }
}

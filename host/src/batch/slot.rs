//! A fixed place for the tables of one batch after another.

use std::sync::Arc;

use super::device_tables::{Copied, DeviceTables};
use super::translate::translate_entry;
use super::{Batch, Place};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::{DeviceMemory, DeviceSlice};

/// A fixed place in a GPU's memory for the tables of one batch after another, so that captured work
/// ([`Device::capture`]) reads lengths and pages of the batch that was put there last.
///
/// What may change from batch to batch are lengths, pages and sequences; rows and blocks stay: captured launches
/// have as many blocks as the first batch asked for. Attention over all tokens ([`TokenSelect::step_dense`]) is then cut
/// into as many splits as for that batch, so its last bits may be others than without a recording; selections, and
/// attention over the selected tokens, are the same. Rows that are gone are replaced by [`Batch::padded`].
///
/// [`TokenSelect::step_dense`]: crate::TokenSelect::step_dense
#[derive(Debug)]
pub struct BatchSlot {
    /// Rows and blocks, without pages.
    pub(super) like: Batch,
    pub(super) page_size: usize,
    pub(super) max_pages: usize,
    /// Tables, room for page numbers, and a word for faults.
    pub(super) memory: Arc<DeviceMemory>,
    place: Arc<Place>,
    device: Device,
}

/// Where the parts of a slot lie.
pub(super) struct Addresses {
    pub qo_indptr: u64,
    pub kv_indptr: u64,
    pub kv_indices: u64,
    pub last_page_len: u64,
    pub sequence_indices: u64,
    pub faults: u64,
}

impl BatchSlot {
    /// A place for batches with the rows and blocks of `like` and up to `max_pages` pages in all rows together.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] for the processor, which has no captured work; [`Error::Missing`] for a batch in blocks; [`Error::Limit`] for more pages than can be
    /// counted, [`Error::OutOfMemory`].
    pub fn new(device: &Device, like: &Batch, max_pages: usize) -> Result<Self> {
        let Some(driver) = device.driver() else { return Err(DeviceSlice::not_on_device("device")) };
        like.expect_whole("BatchSlot::new")?;
        // Tokens are told from each other by their places, which are counted with 32 bits.
        let limit = u32::MAX as usize / like.page_size;
        if max_pages > limit {
            return Err(Error::Limit { what: "pages of a slot", limit, got: max_pages });
        }
        driver.prepare(&[translate_entry(driver)?])?; // which cannot be loaded while work is recorded
        let like = like.without_pages();
        let tables = Copied::bytes(&like);
        let memory = DeviceMemory::zeros(driver, tables.len() + 4 * max_pages + 4)?;
        memory.slice().part(0, tables.len()).write(&tables)?;
        Ok(BatchSlot {
            page_size: like.page_size,
            like,
            max_pages,
            memory: Arc::new(memory),
            place: Place::new(),
            device: device.clone(),
        })
    }

    pub(super) fn num_rows(&self) -> usize {
        self.like.num_rows()
    }

    pub(super) fn addresses(&self) -> Addresses {
        let at = Copied::at(&self.like, Arc::clone(&self.memory));
        let slice = self.memory.slice();
        Addresses {
            qo_indptr: at.qo_indptr,
            kv_indptr: at.kv_indptr,
            kv_indices: at.kv_indices,
            last_page_len: at.last_page_len,
            sequence_indices: at.sequence_indices,
            faults: slice.addr() + slice.len() as u64 - 4,
        }
    }

    /// Puts a batch in this place, after the device's earlier work, and returns it bound there: work captured with the
    /// returned batch reads whatever batch was put here last when it is launched.
    ///
    /// # Errors
    /// [`Error::Table`] where the rows, blocks or page size are not those of the slot's first batch, [`Error::Limit`]
    /// for too many pages. What was recorded with a batch of this slot stays within its bounds: what the recorded
    /// operations would refuse is refused here, with the same errors. Then the slot holds what it held before.
    pub fn put(&mut self, mut batch: Batch) -> Result<Batch> {
        batch.expect_on_host("put")?;
        batch.expect_whole("put")?;
        let like = &self.like;
        if batch.qo_indptr != like.qo_indptr {
            let rule = format!("that of the slot, {:?}", like.qo_indptr);
            return Err(Error::table("qo_indptr", rule, format!("{:?}", batch.qo_indptr)));
        }
        if batch.page_size != like.page_size {
            let rule = format!("that of the slot, {}", like.page_size);
            return Err(Error::table("page_size", rule, batch.page_size));
        }
        self.expect_given("sequence_indices", like.has_sequences(), batch.has_sequences())?;
        self.expect_given("candidates", like.is_partial(), batch.is_partial())?;
        let got = batch.tables.indices.len();
        if got > self.max_pages {
            return Err(Error::Limit { what: "pages of a slot", limit: self.max_pages, got });
        }
        self.check_needs(&batch)?;
        batch.on_device = DeviceTables::put(&batch, &self.memory)?;
        Ok(self.occupy(batch))
    }

    /// Checks that a table is given exactly if the slot's batches have it.
    pub(super) fn expect_given(&self, what: &'static str, expected: bool, got: bool) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        let name = |given| if given { "given" } else { "left out" };
        Err(Error::table(what, format!("{}, as in the slot's first batch", name(expected)), name(got)))
    }

    /// Checks that a batch stays within the limits of what was recorded with this slot's batches.
    pub(super) fn check_needs(&self, batch: &Batch) -> Result<()> {
        let needs = self.place.needs();
        let (limit, got) = (needs.max_kv_tokens, batch.num_token_places());
        if got > limit {
            return Err(Error::Limit { what: "max_kv_tokens", limit, got });
        }
        batch.check_selected(needs.max_selected, needs.top_k)?;
        batch.check_pages(needs.num_pages)?;
        batch.check_sequences(needs.num_sequences)?;
        if needs.appends { batch.check_written_pages() } else { Ok(()) }
    }

    /// Binds a batch whose tables are in the slot's memory.
    pub(super) fn bind(&mut self, mut batch: Batch) -> Batch {
        batch.on_device = DeviceTables::bound(&self.like, &self.memory);
        self.occupy(batch)
    }

    fn occupy(&mut self, mut batch: Batch) -> Batch {
        self.place.occupy(&self.device, batch.number(), batch.owned());
        batch.identity = batch.identity.placed(&self.place);
        batch
    }
}

//! A fixed place for the tables of one batch after another.

use std::sync::Arc;

use super::device_tables::{Copied, DeviceTables};
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
    qo_indptr: Vec<u32>,
    page_size: usize,
    has_sequences: bool,
    is_partial: bool,
    max_pages: usize,
    memory: Arc<DeviceMemory>,
    place: Arc<Place>,
}

impl BatchSlot {
    /// A place for batches with the rows and blocks of `like` and up to `max_pages` pages in all rows together.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] for the processor, which has no captured work; [`Error::Limit`] for more pages than can be
    /// counted, [`Error::OutOfMemory`].
    pub fn new(device: &Device, like: &Batch, max_pages: usize) -> Result<Self> {
        let Some(driver) = device.driver() else { return Err(DeviceSlice::not_on_device("device")) };
        let fixed = Copied::bytes(like).len() - 4 * like.tables.indices.len();
        // Page numbers are told from each other by their places, which are counted with 32 bits.
        let limit = u32::MAX as usize / like.page_size;
        if max_pages > limit {
            return Err(Error::Limit { what: "pages of a slot", limit, got: max_pages });
        }
        Ok(BatchSlot {
            qo_indptr: like.qo_indptr.clone(),
            page_size: like.page_size,
            has_sequences: like.has_sequences(),
            is_partial: like.is_partial(),
            max_pages,
            memory: Arc::new(DeviceMemory::zeros(driver, fixed + 4 * max_pages)?),
            place: Place::new(),
        })
    }

    /// Puts a batch in this place, after the device's earlier work, and returns it bound there: work captured with the
    /// returned batch reads whatever batch was put here last when it is launched.
    ///
    /// # Errors
    /// [`Error::Table`] where the rows, blocks or page size are not those of the slot's first batch, [`Error::Limit`]
    /// for too many pages. What was recorded with a batch of this slot stays within its bounds: what the recorded
    /// operations would refuse is refused here, with the same errors. Then the slot holds what it held before.
    pub fn put(&mut self, mut batch: Batch) -> Result<Batch> {
        let rows = batch.num_rows();
        if batch.qo_indptr != self.qo_indptr {
            let rule = format!("that of the slot, {:?}", self.qo_indptr);
            return Err(Error::table(rows, "qo_indptr", rule, format!("{:?}", batch.qo_indptr)));
        }
        for (what, expected, got) in [
            ("page_size", self.page_size, batch.page_size),
            ("sequence_indices", usize::from(self.has_sequences), usize::from(batch.has_sequences())),
            ("candidates", usize::from(self.is_partial), usize::from(batch.is_partial())),
        ] {
            if got != expected {
                return Err(Error::table(rows, what, format!("as in the slot, {expected}"), got));
            }
        }
        let got = batch.tables.indices.len();
        if got > self.max_pages {
            return Err(Error::Limit { what: "pages of a slot", limit: self.max_pages, got });
        }
        let needs = self.place.occupied().needs;
        let (limit, got) = (needs.max_kv_tokens, batch.num_token_places());
        if got > limit {
            return Err(Error::Limit { what: "max_kv_tokens", limit, got });
        }
        batch.check_pages(needs.num_pages)?;
        batch.check_sequences(needs.num_sequences)?;
        if needs.appends {
            batch.check_written_pages()?;
        }
        batch.on_device = DeviceTables::put(&batch, &self.memory)?;
        let mut occupied = self.place.occupied();
        (occupied.number, occupied.blocks) = (batch.number(), batch.blocks());
        drop(occupied);
        batch.identity = batch.identity.placed(&self.place);
        Ok(batch)
    }
}

//! The copy of a batch's tables in the memory of a GPU: one allocation, made at first use, shared by clones.

use std::sync::{Arc, OnceLock};

use super::Batch;
use crate::backend::gpu::driver::Driver;
use crate::device_memory::DeviceMemory;
use crate::error::Result;

/// Made at first use, for one device.
#[derive(Clone, Default)]
pub(super) struct DeviceTables(OnceLock<Arc<Copied>>);

/// The allocation and the addresses in it; 0 for a table that the batch does not have.
pub(super) struct Copied {
    memory: DeviceMemory,
    pub qo_indptr: u64,
    pub kv_indptr: u64,
    pub kv_indices: u64,
    pub last_page_len: u64,
    pub sequence_indices: u64,
    pub candidates: u64,
}

impl DeviceTables {
    /// The copy on `driver`'s device. A batch serves one device: the second one asked for is refused.
    pub fn get(&self, batch: &Batch, driver: &Arc<dyn Driver>) -> Result<&Copied> {
        let copied = match self.0.get() {
            Some(copied) => copied,
            None => {
                let fresh = Arc::new(Copied::new(batch, driver)?);
                self.0.get_or_init(|| fresh)
            }
        };
        copied.memory.slice().expect_on(driver, "batch")?;
        Ok(copied)
    }
}

impl Copied {
    fn new(batch: &Batch, driver: &Arc<dyn Driver>) -> Result<Self> {
        let mut bytes = Vec::new();
        let mut add = |table: &[u32]| {
            let begin = bytes.len() as u64;
            bytes.extend(table.iter().flat_map(|word| word.to_ne_bytes()));
            begin
        };
        let qo_indptr = add(&batch.qo_indptr);
        let kv_indptr = add(&batch.tables.indptr);
        let kv_indices = add(&batch.tables.indices);
        let last_page_len = add(&batch.tables.last_page_len);
        let sequence_indices = batch.sequence_indices.as_ref().map(|indices| add(indices));
        let candidates = batch.candidates.as_ref().map(|ranges| {
            let flat: Vec<u32> = ranges.iter().flat_map(|range| [range.start, range.end]).collect();
            add(&flat)
        });
        let memory = DeviceMemory::from_bytes(driver, &bytes)?;
        let base = memory.slice().addr();
        Ok(Copied {
            memory,
            qo_indptr: base + qo_indptr,
            kv_indptr: base + kv_indptr,
            kv_indices: base + kv_indices,
            last_page_len: base + last_page_len,
            sequence_indices: sequence_indices.map_or(0, |at| base + at),
            candidates: candidates.map_or(0, |at| base + at),
        })
    }
}

impl std::fmt::Debug for DeviceTables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.get().is_some() { "on a device" } else { "on the host" })
    }
}

//! The copy of a batch's tables in the memory of a GPU: made at first use and shared by clones, or put in a
//! [`BatchSlot`](super::BatchSlot).

use std::sync::{Arc, OnceLock};

use tokenselect_kernels::limits::COLUMNS;

use super::Batch;
use crate::driver::Driver;
use crate::error::Result;
use crate::memory::DeviceMemory;

/// Made at first use, for one device.
#[derive(Clone, Default)]
pub(super) struct DeviceTables(OnceLock<Arc<Copied>>);

/// The memory and the addresses in it; 0 for a table that the batch does not have.
pub(super) struct Copied {
    memory: Arc<DeviceMemory>,
    pub qo_indptr: u64,
    pub kv_indptr: u64,
    pub kv_indices: u64,
    pub last_page_len: u64,
    pub sequence_indices: u64,
    pub candidates: u64,
    /// Groups of blocks, for each of the sizes that kernels have.
    pub groups: [u64; COLUMNS.len()],
}

impl DeviceTables {
    /// The copy on `driver`'s device. A batch serves one device: the second one asked for is refused.
    pub fn get(&self, batch: &Batch, driver: &Arc<dyn Driver>) -> Result<&Copied> {
        let copied = match self.0.get() {
            Some(copied) => copied,
            None => {
                let bytes = Copied::bytes(batch);
                let memory = Arc::new(DeviceMemory::from_bytes(driver, &bytes)?);
                self.0.get_or_init(|| Arc::new(Copied::at(batch, memory)))
            }
        };
        copied.memory.slice().expect_on(driver, "batch")?;
        Ok(copied)
    }

    /// Tables that lie in memory of one's own already, in the order of those of `like`.
    pub fn bound(like: &Batch, memory: &Arc<DeviceMemory>) -> Self {
        DeviceTables(OnceLock::from(Arc::new(Copied::at(like, Arc::clone(memory)))))
    }

    /// Checks that a copy, if there is one, lies on the driver's device.
    pub fn expect_on(&self, driver: &Arc<dyn Driver>) -> Result<()> {
        self.0.get().map_or(Ok(()), |copied| copied.memory.slice().expect_on(driver, "batch"))
    }

    /// The memory of the copy, if there is one.
    pub fn memory(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>> {
        self.0.get().map(|copied| -> Arc<dyn std::any::Any + Send + Sync> { copied.memory.clone() })
    }

    /// A copy in memory of one's own, which holds at least [`Copied::bytes`].
    pub fn put(batch: &Batch, memory: &Arc<DeviceMemory>) -> Result<Self> {
        let bytes = Copied::bytes(batch);
        memory.slice().part(0, bytes.len()).write(&bytes)?;
        Ok(DeviceTables(OnceLock::from(Arc::new(Copied::at(batch, Arc::clone(memory))))))
    }
}

/// The tables in their order in memory. Groups are pairs of words, which want multiples of 8; page numbers, whose number changes
/// from step to step, come last.
fn tables(batch: &Batch) -> [Vec<u32>; 9] {
    let candidates = batch.candidates.iter().flatten().flat_map(|range| [range.start, range.end]);
    let [few, more, most] = batch.group_tables();
    [
        few,
        more,
        most,
        batch.qo_indptr.clone(),
        batch.tables.indptr.clone(),
        batch.tables.last_page_len.clone(),
        batch.sequence_indices.clone().unwrap_or_default(),
        candidates.collect(),
        batch.tables.indices.clone(),
    ]
}

impl Copied {
    /// What lies in memory.
    pub fn bytes(batch: &Batch) -> Vec<u8> {
        tables(batch).iter().flatten().flat_map(|word| word.to_ne_bytes()).collect()
    }

    pub fn at(batch: &Batch, memory: Arc<DeviceMemory>) -> Self {
        let mut end = memory.slice().addr();
        let places = tables(batch).map(|table| {
            let begin = end;
            end += 4 * table.len() as u64;
            begin
        });
        let [few, more, most, qo_indptr, kv_indptr, last_page_len, sequence_indices, candidates, kv_indices] =
            places;
        Copied {
            memory,
            qo_indptr,
            kv_indptr,
            kv_indices,
            last_page_len,
            sequence_indices: batch.sequence_indices.as_ref().map_or(0, |_| sequence_indices),
            candidates: batch.candidates.as_ref().map_or(0, |_| candidates),
            groups: [few, more, most],
        }
    }
}

impl std::fmt::Debug for DeviceTables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.get().is_some() { "on a device" } else { "on the host" })
    }
}

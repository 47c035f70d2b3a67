//! Memory of a GPU, or of the emulated one: owned and borrowed byte ranges.

use std::marker::PhantomData;
use std::sync::Arc;

use crate::device::Device;
use crate::driver::Driver;
use crate::error::{Error, Result};

/// An allocation, freed when it is dropped.
pub(crate) struct DeviceMemory {
    driver: Arc<dyn Driver>,
    addr: u64,
    bytes: usize,
}

/// A byte range of a device.
#[derive(Clone, Copy)]
pub(crate) struct DeviceSlice<'a> {
    driver: &'a Arc<dyn Driver>,
    addr: u64,
    bytes: usize,
    memory: PhantomData<&'a ()>,
}

impl DeviceMemory {
    /// An allocation of zeros. Of 0 bytes, no allocation.
    pub fn zeros(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        let memory = DeviceMemory::uninitialised(driver, bytes)?;
        if bytes > 0 {
            driver.zero(memory.addr, bytes)?;
        }
        Ok(memory)
    }

    /// An allocation that holds `bytes`.
    pub fn from_bytes(driver: &Arc<dyn Driver>, bytes: &[u8]) -> Result<Self> {
        let memory = DeviceMemory::uninitialised(driver, bytes.len())?;
        memory.slice().write(bytes)?;
        Ok(memory)
    }

    fn uninitialised(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        let addr = if bytes == 0 { 0 } else { driver.alloc(bytes)? };
        Ok(DeviceMemory { driver: Arc::clone(driver), addr, bytes })
    }

    /// The whole of it.
    pub fn slice(&self) -> DeviceSlice<'_> {
        DeviceSlice { driver: &self.driver, addr: self.addr, bytes: self.bytes, memory: PhantomData }
    }
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceMemory({} bytes on {})", self.bytes, self.driver.name())
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.addr != 0 {
            self.driver.free(self.addr);
        }
    }
}

impl<'a> DeviceSlice<'a> {
    /// Memory that somebody else owns.
    pub fn borrow(device: &'a Device, addr: u64, bytes: usize) -> Result<Self> {
        let Some(driver) = device.driver() else { return Err(DeviceSlice::not_on_device("device")) };
        Ok(DeviceSlice { driver, addr, bytes, memory: PhantomData })
    }

    /// Device address of the first byte.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// The driver of its device.
    pub fn driver(&self) -> &'a Arc<dyn Driver> {
        self.driver
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The bytes `begin..end` of it.
    pub fn part(self, begin: usize, end: usize) -> Self {
        debug_assert!(begin <= end && end <= self.bytes, "{begin}..{end} of {} bytes", self.bytes);
        DeviceSlice { addr: self.addr + begin as u64, bytes: end - begin, ..self }
    }

    /// Checks that the memory belongs to `driver`.
    pub fn expect_on(&self, driver: &Arc<dyn Driver>, what: &'static str) -> Result<()> {
        if Arc::ptr_eq(self.driver, driver) {
            return Ok(());
        }
        let (expected, got) = (driver.name().to_owned(), self.driver.name().to_owned());
        Err(Error::WrongDevice { what, expected, got })
    }

    /// Copies the bytes to the host. Waits for earlier work.
    pub fn read(self, to: &mut [u8]) -> Result<()> {
        debug_assert_eq!(self.bytes, to.len());
        if to.is_empty() { Ok(()) } else { self.driver.read(self.addr, to) }
    }

    /// Copies bytes from the host.
    pub fn write(self, from: &[u8]) -> Result<()> {
        debug_assert_eq!(self.bytes, from.len());
        if from.is_empty() { Ok(()) } else { self.driver.write(self.addr, from) }
    }

    /// Copies bytes of the same device.
    pub fn copy_from(self, from: DeviceSlice<'_>) -> Result<()> {
        debug_assert_eq!(self.bytes, from.bytes);
        from.expect_on(self.driver, "from")?;
        if self.bytes == 0 { Ok(()) } else { self.driver.copy(self.addr, from.addr, self.bytes) }
    }

    /// The error for device memory where host memory is needed.
    pub fn not_on_host(&self, what: &'static str) -> Error {
        Error::WrongDevice { what, expected: "cpu".into(), got: self.driver.name().to_owned() }
    }

    /// The error for host memory where device memory is needed.
    pub fn not_on_device(what: &'static str) -> Error {
        Error::WrongDevice { what, expected: "a GPU".into(), got: "cpu".into() }
    }
}

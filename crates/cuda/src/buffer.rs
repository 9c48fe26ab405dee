//! Device memory: a caching pool, buffers from it, and copies.
//!
//! All work of a [`Device`] goes through one stream in order, so a buffer that is dropped can be handed out again at once: whatever still uses
//! it was enqueued before whatever will use it next. Blocks come from the driver in size classes at most an eighth larger than what was
//! asked for, and go back to it only when memory is short or [`Device::trim`] says so. A buffer may also be memory that somebody else owns.

use std::{
    collections::HashMap,
    ffi::c_void,
    mem::size_of_val,
    ptr::{self, NonNull},
    sync::{Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::sys;
use half::{bf16, f16};
use lawson_core::{Error, ErrorKind, Result};

use crate::{
    device::{Device, Event},
    driver::{CUresult, check, human},
};

/// Smallest block, and the alignment of every one.
const GRAIN: usize = 512;
/// Alignment of memory that somebody else owns: what the widest access of a kernel and the bulk copy engine ask for.
const BORROWED_ALIGNMENT: u64 = 16;

/// Types whose values are plain bytes on both sides.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub unsafe trait Element: Copy + 'static {}

// SAFETY: numbers without padding or forbidden values.
unsafe impl Element for u8 {}
// SAFETY: as above.
unsafe impl Element for u16 {}
// SAFETY: as above.
unsafe impl Element for i32 {}
// SAFETY: as above.
unsafe impl Element for u32 {}
// SAFETY: as above.
unsafe impl Element for i64 {}
// SAFETY: as above.
unsafe impl Element for u64 {}
// SAFETY: as above.
unsafe impl Element for f32 {}
// SAFETY: as above.
unsafe impl Element for f64 {}
// SAFETY: transparent over u16.
unsafe impl Element for bf16 {}
// SAFETY: transparent over u16.
unsafe impl Element for f16 {}

/// What a device's pool has handed out, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Asked for and not yet dropped.
    pub in_use: u64,
    /// Most that was in use at once since the last [`Device::reset_peak`].
    pub peak: u64,
    /// Taken from the driver: in use, rounded up to size classes, and kept for later.
    pub reserved: u64,
}

#[derive(Default)]
struct State {
    /// Free blocks by size class.
    free: HashMap<usize, Vec<u64>>,
    usage: Usage,
}

/// The blocks of one device.
#[derive(Default)]
pub(crate) struct Pool(Mutex<State>);

/// Next multiple of a sixteenth of the power of two above `bytes`, but at least of [`GRAIN`]; None beyond what a number holds.
fn size_class(bytes: usize) -> Option<usize> {
    let step = (bytes.checked_next_power_of_two()? / 16).max(GRAIN);
    bytes.max(1).checked_next_multiple_of(step)
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        // The numbers are consistent between any two statements that could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives every free block back to the driver. The context is current, and the stream has nothing left that uses them.
    pub(crate) fn free_cached(&self) {
        let mut state = self.state();
        for (class, blocks) in std::mem::take(&mut state.free) {
            for block in blocks {
                // SAFETY: the block came from cuMemAlloc, is in no buffer, and no enqueued work uses it.
                unsafe { sys::cuMemFree_v2(block) };
                state.usage.reserved -= class as u64;
            }
        }
    }
}

impl Device {
    /// `bytes` of device memory, not initialised.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] with what was asked for and what is free. Everything handed out before stays valid.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer> {
        let refuse = |free: u64| {
            let (name, total) = (&self.info().name, human(self.info().memory_bytes));
            let (asked, free) = (human(bytes as u64), human(free));
            Error::new(
                ErrorKind::OutOfMemory,
                format!("{asked} of GPU memory were asked for, and {free} of the {total} of {name} are free"),
            )
        };
        let Some(class) = size_class(bytes) else { return Err(refuse(self.free_bytes()?)) };
        let taken = |state: &mut State, ptr| {
            state.usage.in_use += bytes as u64;
            state.usage.peak = state.usage.peak.max(state.usage.in_use);
            DeviceBuffer { ptr, bytes, class: Some(class), device: self.clone() }
        };
        {
            let mut state = self.pool().state();
            if let Some(block) = state.free.get_mut(&class).and_then(Vec::pop) {
                return Ok(taken(&mut state, block));
            }
        }
        let mut free = self.free_bytes()?;
        if free < class as u64 {
            self.trim()?;
            free = self.free_bytes()?;
        }
        if free < class as u64 {
            return Err(refuse(free));
        }
        let mut block = 0;
        // SAFETY: `free_bytes` made the context current; `block` outlives the call.
        let mut code = unsafe { sys::cuMemAlloc_v2(&mut block, class) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.trim()?;
            // SAFETY: as above.
            code = unsafe { sys::cuMemAlloc_v2(&mut block, class) };
        }
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(refuse(self.free_bytes()?));
        }
        check(code, || format!("taking {} of GPU memory", human(bytes as u64)))?;
        let mut state = self.pool().state();
        state.usage.reserved += class as u64;
        Ok(taken(&mut state, block))
    }

    /// A new buffer with the bytes of `data`.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn upload<T: Element>(&self, data: &[T]) -> Result<DeviceBuffer> {
        let buffer = self.alloc(size_of_val(data))?;
        buffer.write(data)?;
        Ok(buffer)
    }

    /// Bytes in use, their peak, and bytes held.
    pub fn usage(&self) -> Usage {
        self.pool().state().usage
    }

    /// Starts a new peak from what is in use now.
    pub fn reset_peak(&self) {
        let mut state = self.pool().state();
        state.usage.peak = state.usage.in_use;
    }

    /// Gives memory that no buffer uses back to the driver; waits for the enqueued work.
    ///
    /// # Errors
    /// As [`Device::synchronize`].
    pub fn trim(&self) -> Result<()> {
        self.synchronize()?;
        self.pool().free_cached();
        Ok(())
    }
}

/// The end of the range of device memory that `address` lies in.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] when it is no memory of `device`.
fn range_end(device: &Device, address: u64) -> Result<u64> {
    use sys::CUpointer_attribute as Attribute;
    let ask = |which: Attribute, to: *mut c_void| {
        // SAFETY: `bind` below made the context current; each caller points to a live value of the type that the driver documents for `which`.
        match unsafe { sys::cuPointerGetAttribute(to, which, address) } {
            CUresult::CUDA_ERROR_INVALID_VALUE => {
                Err(Error::invalid(format!("the driver knows of no memory of a GPU at {address:#x}")))
            }
            code => check(code, || format!("asking about the memory at {address:#x}")),
        }
    };
    device.bind()?;
    let (mut kind, mut ordinal, mut start, mut size) = (0u32, 0i32, 0u64, 0usize);
    ask(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (&raw mut kind).cast())?;
    if kind != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 {
        return Err(Error::invalid(format!("{address:#x} is memory of the host")));
    }
    ask(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, (&raw mut ordinal).cast())?;
    if usize::try_from(ordinal) != Ok(device.info().ordinal) {
        return Err(Error::invalid(format!("{address:#x} is memory of cuda:{ordinal}")));
    }
    ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, (&raw mut start).cast())?;
    ask(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, (&raw mut size).cast())?;
    let end = start.saturating_add(size as u64);
    if end <= address {
        return Err(Error::invalid(format!("the driver knows of no memory of a GPU at {address:#x}")));
    }
    Ok(end)
}

/// Memory of a device; goes back to its pool when dropped, unless somebody else owns it. Its methods take `&self`: Rust never looks at device
/// memory, and the stream's order keeps writes apart.
pub struct DeviceBuffer {
    ptr: u64,
    bytes: usize,
    /// Of the pool's block; none where somebody else owns the memory.
    class: Option<usize>,
    device: Device,
}

impl DeviceBuffer {
    /// `bytes` of memory at `ptr` that somebody else owns and frees. They are no part of [`Device::usage`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when they are not all memory of `device` or do not begin at a multiple of 16.
    ///
    /// # Safety
    /// The memory is `device`'s to use, in its primary context, until the buffer is dropped and all work enqueued with it is done. Whoever
    /// else writes what that work reads, or uses what it writes, comes before or behind it: in the device's stream, or after waiting.
    pub unsafe fn from_raw_parts(device: &Device, ptr: u64, bytes: usize) -> Result<DeviceBuffer> {
        let refuse = |why: &str| Error::invalid(format!("{bytes} bytes at {ptr:#x} for cuda:{}: {why}", device.info().ordinal));
        if !ptr.is_multiple_of(BORROWED_ALIGNMENT) {
            return Err(refuse(&format!("the address is not a multiple of {BORROWED_ALIGNMENT}")));
        }
        let end = ptr.checked_add(bytes as u64).ok_or_else(|| refuse("no address space ends there"))?;
        let mut known = ptr;
        // Allocators that grow in place back one piece of memory by several ranges.
        while known < end {
            known = range_end(device, known).map_err(|e| match e.kind() {
                ErrorKind::InvalidInput => refuse(&e.to_string()),
                _ => e,
            })?;
        }
        Ok(DeviceBuffer { ptr, bytes, class: None, device: device.clone() })
    }

    /// Its address on the device, a multiple of 256; of 16 where somebody else owns the memory.
    #[inline]
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its size.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device it is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when they do not lie in the buffer.
    pub fn range(&self, offset: usize, bytes: usize) -> Result<u64> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.ptr + offset as u64),
            _ => Err(Error::invalid(format!("{bytes} bytes at {offset} do not lie in a buffer of {} bytes", self.bytes))),
        }
    }

    /// Copies `data` to the start of the buffer and waits.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when it does not fit.
    pub fn write<T: Element>(&self, data: &[T]) -> Result<()> {
        self.write_at(0, data)
    }

    /// Copies `data` to the bytes from `offset` and waits.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when it does not fit.
    pub fn write_at<T: Element>(&self, offset: usize, data: &[T]) -> Result<()> {
        let bytes = size_of_val(data);
        let to = self.range(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _open = self.device.hold_open()?;
        self.device.bind()?;
        let from = data.as_ptr().cast();
        // SAFETY: `range` says that the destination lies in this buffer; `data` is borrowed until the copy is waited for below.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes, self.device.raw_stream()) };
        check(copied, || format!("copying {} to the GPU", human(bytes as u64)))?;
        self.device.wait()
    }

    /// Waits for the enqueued work and copies the start of the buffer into `data`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when `data` is larger than the buffer; [`ErrorKind::Device`] when the work before it failed.
    pub fn read<T: Element>(&self, data: &mut [T]) -> Result<()> {
        self.read_at(0, data)
    }

    /// Waits for the enqueued work and copies the bytes from `offset` into `data`.
    ///
    /// # Errors
    /// As [`DeviceBuffer::read`].
    pub fn read_at<T: Element>(&self, offset: usize, data: &mut [T]) -> Result<()> {
        let bytes = size_of_val(data);
        let from = self.range(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _open = self.device.hold_open()?;
        self.device.bind()?;
        let to = data.as_mut_ptr().cast();
        // SAFETY: `range` says that the source lies in this buffer; `data` is borrowed exclusively until the copy is waited for below, and
        // any bytes are values of an `Element`.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes, self.device.raw_stream()) };
        check(copied, || format!("copying {} from the GPU", human(bytes as u64)))?;
        self.device.wait()
    }

    /// The first `len` values, copied out.
    ///
    /// # Errors
    /// As [`DeviceBuffer::read`].
    pub fn to_vec<T: Element + Default>(&self, len: usize) -> Result<Vec<T>> {
        let mut data = vec![T::default(); len];
        self.read(&mut data)?;
        Ok(data)
    }

    /// Enqueues a copy of `bytes` bytes at `from_offset` of `from` to `offset` of this buffer.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when they do not lie in both, or the buffers are of different devices.
    pub fn copy_from(&self, offset: usize, from: &DeviceBuffer, from_offset: usize, bytes: usize) -> Result<()> {
        if self.device.stream() != from.device.stream() || self.device.info().ordinal != from.device.info().ordinal {
            return Err(Error::invalid("a copy between buffers of two devices"));
        }
        let (to, from) = (self.range(offset, bytes)?, from.range(from_offset, bytes)?);
        if bytes == 0 {
            return Ok(());
        }
        let _open = self.device.hold_open()?;
        self.device.bind()?;
        // SAFETY: `range` says that both lie in their buffers, which stay until the work enqueued before their drop is done.
        let copied = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.device.raw_stream()) };
        check(copied, || format!("copying {} on the GPU", human(bytes as u64)))
    }

    /// Enqueues setting every byte to `value`.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] with the driver's word.
    pub fn fill(&self, value: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let _open = self.device.hold_open()?;
        self.device.bind()?;
        // SAFETY: the buffer has that many bytes, and stays until the work enqueued before its drop is done.
        check(unsafe { sys::cuMemsetD8Async(self.ptr, value, self.bytes, self.device.raw_stream()) }, || {
            "filling GPU memory".into()
        })
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let Some(class) = self.class else { return };
        let mut state = self.device.pool().state();
        state.usage.in_use -= self.bytes as u64;
        state.free.entry(class).or_default().push(self.ptr);
    }
}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceBuffer({:#x}, {} bytes)", self.ptr, self.bytes)
    }
}

/// Sends small pieces of data, such as the lengths of a call, to the device without waiting for it: they go through page-locked memory in
/// turns, and a turn waits only when the copy made all turns ago has not happened yet.
pub struct Staging {
    memory: NonNull<u8>,
    bytes: usize,
    turns: Mutex<Turns>,
    device: Device,
}

struct Turns {
    next: usize,
    done: Vec<Event>,
}

// SAFETY: the memory is reached only under the lock of `turns`.
unsafe impl Send for Staging {}
// SAFETY: as above.
unsafe impl Sync for Staging {}

impl Staging {
    /// `turns` pieces of at most `bytes` bytes may be under way at once.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] when so much cannot be page-locked.
    pub fn new(device: &Device, bytes: usize, turns: usize) -> Result<Staging> {
        let turns = turns.max(1);
        let whole = bytes
            .max(1)
            .checked_mul(turns)
            .ok_or_else(|| Error::invalid(format!("{turns} times {bytes} bytes of staging memory")))?;
        let done = (0..turns).map(|_| Event::new(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)).collect::<Result<_>>()?;
        device.bind()?;
        let mut memory: *mut c_void = ptr::null_mut();
        // SAFETY: the context is current, `memory` outlives the call; `drop` frees it.
        check(unsafe { sys::cuMemHostAlloc(&mut memory, whole, 0) }, || format!("page-locking {}", human(whole as u64)))?;
        let memory = NonNull::new(memory.cast()).ok_or_else(|| Error::new(ErrorKind::OutOfMemory, "no page-locked memory"))?;
        Ok(Staging { memory, bytes: bytes.max(1), turns: Mutex::new(Turns { next: 0, done }), device: device.clone() })
    }

    /// Enqueues a copy of `data` to `offset` of `to`; `data` may change as soon as this returns. Not to be captured in a graph, whose replay
    /// would copy whatever stands there then.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when `data` is larger than a piece or does not fit.
    pub fn send<T: Element>(&self, to: &DeviceBuffer, offset: usize, data: &[T]) -> Result<()> {
        self.send_all(to, std::iter::once((offset, data)))
    }

    /// As [`Staging::send`], of several (offset, data) in one turn.
    ///
    /// # Errors
    /// As [`Staging::send`], where all data together are the piece; nothing is enqueued then.
    pub fn send_all<'a, T: Element + 'a>(
        &self,
        to: &DeviceBuffer,
        all: impl Iterator<Item = (usize, &'a [T])> + Clone,
    ) -> Result<()> {
        let mut bytes = 0usize;
        for (offset, data) in all.clone() {
            to.range(offset, size_of_val(data))?;
            bytes = bytes.saturating_add(size_of_val(data));
        }
        if bytes > self.bytes {
            return Err(Error::invalid(format!("{bytes} bytes in staging pieces of {}", self.bytes)));
        }
        if bytes == 0 {
            return Ok(());
        }
        let _open = self.device.hold_open()?;
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = turns.next;
        // An event that was never recorded counts as done.
        turns.done[turn].synchronize()?;
        let mut used = 0;
        let copied = all.filter(|(_, data)| size_of_val(*data) > 0).try_for_each(|(offset, data)| {
            let size = size_of_val(data);
            let address = to.range(offset, size)?;
            if size > self.bytes - used {
                return Err(Error::invalid(format!("more than the {bytes} bytes that were counted")));
            }
            // SAFETY: `turn` is less than the number of pieces and `used` at most their size, so the place lies in the memory; nobody else reaches
            // it under the lock, and the copies from it made a round ago are done.
            let place = unsafe { self.memory.add(turn * self.bytes + used) }.as_ptr();
            used += size;
            // SAFETY: `data` has `size` bytes, the piece has as many left, and they are apart, since the piece is handed to nobody.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr().cast::<u8>(), place, size) };
            // SAFETY: `range` says that the destination lies in `to`; the place is not touched before the event below, and `drop` waits.
            let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(address, place.cast(), size, self.device.raw_stream()) };
            check(copied, || format!("copying {} to the GPU", human(size as u64)))
        });
        // Also behind copies that were enqueued before one failed.
        turns.done[turn].record_here()?;
        turns.next = (turn + 1) % turns.done.len();
        copied
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.device.synchronize().is_ok() {
            // SAFETY: from cuMemHostAlloc, freed only here, and no copy from it is under way.
            unsafe { sys::cuMemFreeHost(self.memory.as_ptr().cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in [0, 1, 511, 512, 513, 4096, 4097, 1 << 20, (1 << 20) + 1, 3_000_000_001] {
            let class = size_class(bytes).expect("representable");
            assert!(class >= bytes.max(1) && class.is_multiple_of(GRAIN), "{bytes} became {class}");
            assert!(class <= (bytes + bytes / 8).max(bytes + GRAIN), "{bytes} became {class}");
            assert_eq!(size_class(class), Some(class), "a class is its own");
        }
        assert_eq!(size_class(usize::MAX), None);
    }
}

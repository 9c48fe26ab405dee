//! GPUs: what there is, and one opened with its stream and memory.

use std::{
    cell::Cell,
    ffi::{CStr, c_int, c_void},
    fmt, ptr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use lawson_core::{Error, ErrorKind, Result};

use crate::{
    buffer::Pool,
    driver::{self, CUcontext, CUdevice, CUevent, CUresult, CUstream, check},
};

/// What one GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its number, as `cuda:N` names it.
    pub ordinal: usize,
    /// Its product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of second-level cache.
    pub l2_bytes: u32,
    /// Most bytes of shared memory that one block can opt in to.
    pub shared_memory_per_block: u32,
    /// Bytes of shared memory of one multiprocessor.
    pub shared_memory_per_multiprocessor: u32,
    /// Most threads that live on one multiprocessor.
    pub threads_per_multiprocessor: u32,
    /// Highest clock of the multiprocessors in kHz, 0 when unknown.
    pub clock_khz: u32,
    /// CUDA version that the driver supports, major and minor.
    pub driver_version: (u32, u32),
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let memory = driver::human(self.memory_bytes);
        write!(f, "cuda:{} {}, compute capability {major}.{minor}, {memory}", self.ordinal, self.name)
    }
}

/// Every GPU of this machine that the driver shows.
///
/// # Errors
/// [`ErrorKind::Unavailable`] without a driver or a GPU.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    driver::load()?;
    let mut count = 0;
    // SAFETY: the driver is loaded and started; `count` outlives the call.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }, || "counting GPUs".into())?;
    if count <= 0 {
        return Err(Error::new(ErrorKind::Unavailable, "the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES may hide them)"));
    }
    (0..count as usize).map(|ordinal| describe(ordinal).map(|(info, _)| info)).collect()
}

fn describe(ordinal: usize) -> Result<(DeviceInfo, CUdevice)> {
    let doing = || format!("asking about cuda:{ordinal}");
    let number = c_int::try_from(ordinal).map_err(|_| Error::invalid(format!("there is no cuda:{ordinal}")))?;
    let mut device: CUdevice = 0;
    // SAFETY: `device` outlives the call.
    check(unsafe { sys::cuDeviceGet(&mut device, number) }, doing)?;
    let mut name = [0; 256];
    // SAFETY: the driver writes at most the 256 bytes of `name`, a zero at their end.
    check(unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) }, doing)?;
    // SAFETY: the call above ended the string within `name`.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory = 0usize;
    // SAFETY: `device` is the driver's, `memory` outlives the call.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut memory, device) }, doing)?;
    let attribute = |attribute: Attribute| -> Result<u32> {
        let mut value: c_int = 0;
        // SAFETY: `device` is the driver's, `value` outlives the call.
        check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) }, doing)?;
        Ok(value.max(0) as u32)
    };
    let mut version: c_int = 0;
    // SAFETY: `version` outlives the call.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }, doing)?;
    let version = version.max(0) as u32;
    let info = DeviceInfo {
        ordinal,
        name,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory_bytes: memory as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_memory_per_multiprocessor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
        threads_per_multiprocessor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).unwrap_or(0),
        driver_version: (version / 1000, version % 1000 / 10),
    };
    Ok((info, device))
}

/// One GPU, opened: its primary context, a stream that all work goes through in order, and a pool of its memory. Clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    info: DeviceInfo,
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    owns_stream: bool,
    waits_for_each_launch: bool,
    /// Held for writing while the stream is captured, when nobody else may enqueue or wait.
    capture: RwLock<()>,
    pool: Pool,
}

thread_local! {
    /// The device whose stream this thread captures, null if none.
    static CAPTURING: Cell<*const Inner> = const { Cell::new(ptr::null()) };
}

/// A stream closed to everybody but the thread that captures it.
pub(crate) struct Capturing<'a> {
    _closed: RwLockWriteGuard<'a, ()>,
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        CAPTURING.set(ptr::null());
    }
}

// SAFETY: the handles are names that the driver looks up under its own locks; it lets any thread use them once the context is current there,
// which `bind` sees to. The rest is Send and Sync by itself.
unsafe impl Send for Inner {}
// SAFETY: as above; no field is changed through a shared reference, except the pool behind its lock.
unsafe impl Sync for Inner {}

impl Device {
    /// Opens `cuda:ordinal` with a stream of its own.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] without a driver or that GPU.
    pub fn open(ordinal: usize) -> Result<Device> {
        Self::with(ordinal, None)
    }

    /// Opens `cuda:ordinal` to work in the caller's `stream`, a `CUstream` or `cudaStream_t` of that GPU's primary context (null: the default
    /// stream).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when the stream belongs to another context.
    ///
    /// # Safety
    /// `stream` is null or a live stream, and stays so until the last clone of the device and everything made from it are gone.
    pub unsafe fn with_stream(ordinal: usize, stream: *mut c_void) -> Result<Device> {
        Self::with(ordinal, Some(stream.cast()))
    }

    fn with(ordinal: usize, stream: Option<CUstream>) -> Result<Device> {
        let count = devices()?.len();
        if ordinal >= count {
            let last = count - 1;
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("there is no cuda:{ordinal}; this machine has cuda:0 to cuda:{last}"),
            ));
        }
        let (info, device) = describe(ordinal)?;
        let doing = || format!("opening cuda:{ordinal}");
        let mut context = ptr::null_mut();
        // SAFETY: `device` is the driver's, `context` outlives the call. `Inner::drop` releases what is retained here.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) }, doing)?;
        let mut inner = Inner {
            info,
            device,
            context,
            stream: ptr::null_mut(),
            owns_stream: false,
            waits_for_each_launch: std::env::var_os("LAWSON_CUDA_SYNC").is_some_and(|v| v != "0" && !v.is_empty()),
            capture: RwLock::new(()),
            pool: Pool::default(),
        };
        inner.bind()?;
        match stream {
            None => {
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                // SAFETY: the context is current; the stream is destroyed by `Inner::drop`.
                check(unsafe { sys::cuStreamCreate(&mut inner.stream, flags) }, doing)?;
                inner.owns_stream = true;
            }
            Some(stream) => {
                let mut owner = ptr::null_mut();
                // SAFETY: the caller of `with_stream` says that the stream is null or live; null asks about the current context.
                check(unsafe { sys::cuStreamGetCtx(stream, &mut owner) }, doing)?;
                if owner != context {
                    return Err(Error::invalid(format!("the stream does not belong to the primary context of cuda:{ordinal}")));
                }
                inner.stream = stream;
            }
        }
        Ok(Device(Arc::new(inner)))
    }

    /// What this GPU is.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// The stream that work goes through, a `CUstream`.
    pub fn stream(&self) -> *mut c_void {
        self.0.stream.cast()
    }

    /// Waits until all work enqueued so far is done, and reports what failed in it. Set `LAWSON_CUDA_SYNC=1` to learn which kernel it was.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] with the driver's word.
    pub fn synchronize(&self) -> Result<()> {
        let _open = self.hold_open()?;
        self.wait()
    }

    /// Keeps captures out while something is enqueued or waited for. Not to be taken twice by one thread.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] when this thread itself captures: it would wait for itself.
    pub(crate) fn hold_open(&self) -> Result<RwLockReadGuard<'_, ()>> {
        if CAPTURING.get() == Arc::as_ptr(&self.0) {
            return Err(Error::new(
                ErrorKind::Device,
                "what waits, copies, fills, records an event or replays a graph cannot be captured",
            ));
        }
        Ok(self.0.capture.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps everything else out of the stream, which this thread captures.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] when it captures one already, this or another device's.
    pub(crate) fn hold_closed(&self) -> Result<Capturing<'_>> {
        if !CAPTURING.get().is_null() {
            return Err(Error::new(ErrorKind::Device, "a capture inside another cannot be captured"));
        }
        let closed = self.0.capture.write().unwrap_or_else(PoisonError::into_inner);
        CAPTURING.set(Arc::as_ptr(&self.0));
        Ok(Capturing { _closed: closed })
    }

    /// [`Device::synchronize`] where the stream is open.
    pub(crate) fn wait(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is live as long as `self`.
        check(unsafe { sys::cuStreamSynchronize(self.0.stream) }, || format!("waiting for {}", self.0.info.name))
    }

    /// Free bytes of the GPU's memory, whoever uses the rest; what the pool keeps for later counts as used.
    pub fn free_bytes(&self) -> Result<u64> {
        self.bind()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: a context is current, both numbers outlive the call.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, || {
            format!("asking for the free memory of {}", self.0.info.name)
        })?;
        Ok(free as u64)
    }

    /// An event recorded now, behind the work enqueued so far.
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(self, sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        event.record()?;
        Ok(event)
    }

    /// Makes this GPU's context current on the calling thread, as every call of the driver needs it.
    #[inline]
    pub(crate) fn bind(&self) -> Result<()> {
        self.0.bind()
    }

    #[inline]
    pub(crate) fn raw_stream(&self) -> CUstream {
        self.0.stream
    }

    /// Whether every launch is waited for, so that a fault is reported with its kernel.
    #[inline]
    pub(crate) fn waits_for_each_launch(&self) -> bool {
        self.0.waits_for_each_launch
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.0.pool
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.0.info)
    }
}

impl Inner {
    #[inline]
    fn bind(&self) -> Result<()> {
        let mut current = ptr::null_mut();
        // SAFETY: the driver is loaded, `current` outlives the call.
        if unsafe { sys::cuCtxGetCurrent(&mut current) } == CUresult::CUDA_SUCCESS && current == self.context {
            return Ok(());
        }
        // SAFETY: the context is retained until `self` is dropped.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, || format!("selecting cuda:{}", self.info.ordinal))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Errors have nobody to go to here, and a lost device has nothing to give back.
        if self.bind().is_ok() {
            // SAFETY: the stream is live; nothing enqueued in it may use memory that is freed next.
            unsafe { sys::cuStreamSynchronize(self.stream) };
            self.pool.free_cached();
            if self.owns_stream {
                // SAFETY: `open` created it, and no clone of the device is left to use it.
                unsafe { sys::cuStreamDestroy_v2(self.stream) };
            }
        }
        // SAFETY: balances the retain of `with`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A point in a device's stream.
pub struct Event {
    event: CUevent,
    device: Device,
}

// SAFETY: an event is a name that the driver looks up under its own locks, from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(device: &Device, flags: sys::CUevent_flags) -> Result<Event> {
        device.bind()?;
        let mut event = ptr::null_mut();
        // SAFETY: a context is current, `event` outlives the call; `drop` destroys it.
        check(unsafe { sys::cuEventCreate(&mut event, flags as u32) }, || "making an event".into())?;
        Ok(Event { event, device: device.clone() })
    }

    /// Moves this event behind the work enqueued so far.
    pub fn record(&self) -> Result<()> {
        let _open = self.device.hold_open()?;
        self.record_here()
    }

    /// [`Event::record`] where the stream is open.
    pub(crate) fn record_here(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: event and stream are live and of one context.
        check(unsafe { sys::cuEventRecord(self.event, self.device.raw_stream()) }, || "recording an event".into())
    }

    /// Waits until the work in front of this event is done.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the event is live.
        check(unsafe { sys::cuEventSynchronize(self.event) }, || format!("waiting for {}", self.device.info().name))
    }

    /// Milliseconds from `start` to this event; waits for it.
    pub fn ms_since(&self, start: &Event) -> Result<f64> {
        self.synchronize()?;
        // SAFETY: both events are live.
        unsafe { driver::elapsed_ms(start.event, self.event) }.map(f64::from)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `new`, destroyed only here.
            unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

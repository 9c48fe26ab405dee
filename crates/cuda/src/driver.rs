//! Loading NVIDIA's libraries, and what their result codes mean.
//!
//! cudarc's bindings panic when a library or a function in it is missing. So each library is opened here first, with the names the bindings
//! will try, and every function that this crate calls is looked up in it; only then may a binding be called.
//! All of them exist since CUDA 12.0. `cuEventElapsedTime` is called by its own address, because the bindings of CUDA 13 only
//! know a newer variant of it.

use std::{
    ffi::{CStr, c_char},
    sync::OnceLock,
};

use cudarc::driver::sys;
use lawson_core::{Error, ErrorKind, Result};
use libloading::Library;

/// Raw handles of the driver.
pub(crate) use sys::{CUcontext, CUdevice, CUevent, CUfunction, CUgraph, CUgraphExec, CUmodule, CUresult, CUstream};

/// A library that is loaded at run time.
pub(crate) struct Shared {
    /// Its name without prefix and suffix.
    pub(crate) stem: &'static str,
    /// What the user misses without it, and where to get it.
    pub(crate) absent: &'static str,
    /// The functions of it that this crate calls.
    pub(crate) functions: &'static [&'static str],
}

const DRIVER: Shared = Shared {
    stem: "cuda",
    absent: "no NVIDIA driver was found (libcuda.so.1): install one that supports CUDA 12.0 or later, from the distribution or from NVIDIA",
    functions: &[
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceTotalMem_v2",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
        "cuCtxSetCurrent",
        "cuCtxGetCurrent",
        "cuStreamCreate",
        "cuStreamDestroy_v2",
        "cuStreamSynchronize",
        "cuStreamGetCtx",
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuEventCreate",
        "cuEventDestroy_v2",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuMemGetInfo_v2",
        "cuMemAlloc_v2",
        "cuMemFree_v2",
        "cuMemHostAlloc",
        "cuMemFreeHost",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuMemsetD8Async",
        "cuPointerGetAttribute",
        "cuModuleLoadData",
        "cuModuleUnload",
        "cuModuleGetFunction",
        "cuFuncGetAttribute",
        "cuFuncSetAttribute",
        "cuLaunchKernelEx",
        "cuOccupancyMaxActiveBlocksPerMultiprocessor",
        "cuTensorMapEncodeTiled",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuGraphGetNodes",
        "cuGetErrorName",
        "cuGetErrorString",
    ],
};

impl Shared {
    /// Opens the library as the bindings will and looks up every function.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the library, or a function in it, is missing.
    pub(crate) fn open(&self) -> Result<Library> {
        let open = |name: &String| {
            // SAFETY: loading runs the initialisers of the library of that name on the loader's path. They are NVIDIA's, made to be loaded so;
            // whoever can put another library there can replace any part of the process.
            unsafe { Library::new(name) }.ok()
        };
        let unavailable = |message: String| Error::new(ErrorKind::Unavailable, message);
        let names = cudarc::get_lib_name_candidates(self.stem);
        let library = names.iter().find_map(open).ok_or_else(|| unavailable(self.absent.to_owned()))?;
        for name in self.functions {
            // SAFETY: the address is only compared with null by `get`, never called through this type.
            if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
                return Err(unavailable(format!(
                    "lib{} has no function {name}: it is older than CUDA 12.0, which is needed",
                    self.stem
                )));
            }
        }
        Ok(library)
    }
}

type ElapsedTime = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

struct Driver {
    // Kept open so that the bindings find it; never unloaded.
    _library: Library,
    elapsed_time: ElapsedTime,
}

fn driver() -> Result<&'static Driver> {
    static DRIVER_LIBRARY: OnceLock<Result<Driver>> = OnceLock::new();
    DRIVER_LIBRARY
        .get_or_init(|| {
            let library = DRIVER.open()?;
            // SAFETY: this is the driver's documented signature of cuEventElapsedTime; the address stays valid while the library is
            // loaded, and `_library` keeps it loaded.
            let elapsed_time = unsafe { library.get::<ElapsedTime>(b"cuEventElapsedTime\0") }.map(|f| *f);
            let elapsed_time = elapsed_time.map_err(|e| Error::new(ErrorKind::Unavailable, format!("libcuda: {e}")))?;
            // SAFETY: the driver is loaded and has this function; flags must be 0.
            check(unsafe { sys::cuInit(0) }, || "starting the NVIDIA driver".into())?;
            Ok(Driver { _library: library, elapsed_time })
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// Loads and starts the driver, once; every other call of this crate to it comes after an `Ok` of this.
pub(crate) fn load() -> Result<()> {
    driver().map(|_| ())
}

/// Whether a driver is installed, whatever it shows.
pub(crate) fn is_installed() -> bool {
    DRIVER.open().is_ok()
}

/// Milliseconds between two recorded events.
///
/// # Safety
/// Both are live events of one device.
pub(crate) unsafe fn elapsed_ms(start: CUevent, end: CUevent) -> Result<f32> {
    let driver = driver()?;
    let mut ms = 0.0;
    // SAFETY: the caller's events are live, `ms` outlives the call.
    check(unsafe { (driver.elapsed_time)(&mut ms, start, end) }, || "timing work on the GPU".into())?;
    Ok(ms)
}

/// The driver's text for `code`.
fn describe(code: CUresult) -> String {
    let text = |f: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: a code is only described after the driver has returned one, so it is loaded and has both functions; `text` outlives the call.
        let found = unsafe { f(code, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: the driver set `text` to a string of its own that ends in zero and is never freed.
        found.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("code {}", code as u32));
    match text(sys::cuGetErrorString) {
        Some(sentence) => format!("{sentence} ({name})"),
        None => name,
    }
}

/// `code` as a result; `doing` says what was being done.
#[inline]
pub(crate) fn check(code: CUresult, doing: impl FnOnce() -> String) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failure(code, doing())) }
}

#[cold]
fn failure(code: CUresult, doing: String) -> Error {
    use CUresult as C;
    let kind = match code {
        C::CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::OutOfMemory,
        C::CUDA_ERROR_NO_DEVICE
        | C::CUDA_ERROR_STUB_LIBRARY
        | C::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | C::CUDA_ERROR_SYSTEM_NOT_READY
        | C::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => ErrorKind::Unavailable,
        _ => ErrorKind::Device,
    };
    Error::new(kind, format!("{doing}: {}", describe(code)))
}

/// `bytes` in the unit people read.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

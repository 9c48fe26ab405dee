//! CUDA's run-time compiler: from kernel sources to machine code.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    fmt, ptr,
    sync::OnceLock,
};

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};
use lawson_core::{Error, ErrorKind, Result};
use libloading::Library;

use crate::driver::Shared;

const NVRTC: Shared = Shared {
    stem: "nvrtc",
    absent: "NVRTC, CUDA's run-time compiler, was not found (libnvrtc.so.13 or .12): `pip install nvidia-cuda-nvrtc` (CUDA 12: \
             nvidia-cuda-nvrtc-cu12) or the distribution's package has it; its folder must be on LD_LIBRARY_PATH or known to ldconfig",
    functions: &[
        "nvrtcVersion",
        "nvrtcGetNumSupportedArchs",
        "nvrtcGetSupportedArchs",
        "nvrtcCreateProgram",
        "nvrtcDestroyProgram",
        "nvrtcCompileProgram",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
        "nvrtcGetErrorString",
    ],
};

/// A kernel source and the headers it includes, all part of the binary.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Stem of the file.
    pub name: &'static str,
    /// Names of the `extern "C"` kernels in it.
    pub kernels: &'static [&'static str],
    /// Its text.
    pub text: &'static str,
    /// Name and text of each header that it, or one of them, includes.
    pub headers: &'static [(&'static str, &'static str)],
}

/// A source, specialised by macros.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Instance {
    /// What is compiled.
    pub source: &'static Source,
    /// Each macro with its value, in the order in which they are written.
    pub macros: Vec<(&'static str, i64)>,
}

impl Instance {
    /// `source` with `macros`.
    pub fn new(source: &'static Source, macros: &[(&'static str, i64)]) -> Instance {
        Instance { source, macros: macros.to_vec() }
    }

    /// `kernel` and the macros.
    pub(crate) fn named(&self, kernel: &str) -> String {
        self.macros.iter().fold(kernel.to_owned(), |text, (name, value)| format!("{text} {name}={value}"))
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.named(self.source.name))
    }
}

/// Machine code of one instance, and what the compiler said.
#[derive(Clone, Debug)]
pub struct Cubin {
    /// The code.
    pub bytes: Vec<u8>,
    /// Warnings, registers and spills.
    pub log: String,
}

/// What the assembler says a kernel takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// The kernel.
    pub name: String,
    /// Registers of one thread.
    pub registers: u32,
    /// Bytes of local memory of one thread.
    pub stack_bytes: u32,
    /// Bytes that registers are spilled to, stored and loaded.
    pub spill_bytes: u32,
}

impl Cubin {
    /// The resources of each kernel, from the log.
    pub fn resources(&self) -> Vec<Resources> {
        let mut kernels: Vec<Resources> = Vec::new();
        for line in self.log.lines() {
            let before = |what: &str| -> Option<u32> {
                line.split(what).next().filter(|s| s.len() < line.len())?.split_whitespace().last()?.parse().ok()
            };
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                kernels.push(Resources { name: rest.split('\'').next().unwrap_or(rest).to_owned(), ..Resources::default() });
            } else if let Some(kernel) = kernels.last_mut() {
                if let Some(stack) = before(" bytes stack frame") {
                    // A function that was not inlined has a line of its own and counts for the kernel above it.
                    kernel.stack_bytes = kernel.stack_bytes.max(stack);
                    kernel.spill_bytes += before(" bytes spill stores").unwrap_or(0) + before(" bytes spill loads").unwrap_or(0);
                } else if let Some(registers) = before(" registers") {
                    kernel.registers = registers;
                }
            }
        }
        kernels
    }
}

/// The loaded compiler.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc(&'static Loaded);

#[derive(Debug)]
struct Loaded {
    // Kept open so that the bindings find it; never unloaded.
    _library: Library,
    version: (u32, u32),
    architectures: Vec<u32>,
}

impl Nvrtc {
    /// Loads the compiler, once.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when it is not installed.
    pub fn load() -> Result<Nvrtc> {
        static LOADED: OnceLock<Result<Loaded>> = OnceLock::new();
        LOADED.get_or_init(Loaded::new).as_ref().map(Nvrtc).map_err(Clone::clone)
    }

    /// Its CUDA version, major and minor.
    pub fn version(self) -> (u32, u32) {
        self.0.version
    }

    /// The compute capabilities it knows, such as 90, ascending.
    pub fn architectures(self) -> &'static [u32] {
        &self.0.architectures
    }

    /// The target for a GPU: `sm_90a` for compute capability 9.0, whose matrix instructions need the suffix; else its own, or the highest that
    /// the compiler knows of the same major version, whose code runs on later minors.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the compiler knows none for it.
    pub fn target(self, (major, minor): (u32, u32)) -> Result<String> {
        let wanted = major * 10 + minor;
        let known = self.0.architectures.iter().copied().filter(|&a| a / 10 == major && a <= wanted && a >= 80).max();
        match known {
            Some(90) => Ok("sm_90a".into()),
            Some(known) => Ok(format!("sm_{known}")),
            None if wanted < 80 => Err(Error::new(
                ErrorKind::Unavailable,
                format!("the kernels need compute capability 8.0 or later, this GPU has {major}.{minor}"),
            )),
            None => Err(Error::new(
                ErrorKind::Unavailable,
                format!(
                    "NVRTC {}.{} does not know compute capability {major}.{minor}: a later one is needed",
                    self.0.version.0, self.0.version.1
                ),
            )),
        }
    }

    /// The options for `instance` and `target`, in the order in which they are given.
    pub fn options(instance: &Instance, target: &str) -> Vec<String> {
        let fixed = [
            format!("--gpu-architecture={target}"),
            "--std=c++17".into(),
            "--device-as-default-execution-space".into(),
            "--ptxas-options=-v".into(),
        ];
        fixed.into_iter().chain(instance.macros.iter().map(|(name, value)| format!("-D{name}={value}"))).collect()
    }

    /// Compiles `instance` for `target`; any number of threads may do so at once.
    ///
    /// # Errors
    /// [`ErrorKind::Device`], naming kernel and macros, with the compiler's log.
    pub fn compile(self, instance: &Instance, target: &str) -> Result<Cubin> {
        let failed = |what: &str| Error::new(ErrorKind::Device, format!("compiling {instance} for {target}: {what}"));
        let text = |s: &str| CString::new(s).map_err(|_| failed("a zero byte in a source"));
        let source = text(instance.source.text)?;
        let name = text(&format!("{}.cu", instance.source.name))?;
        let headers = instance.source.headers.iter().map(|(_, t)| text(t)).collect::<Result<Vec<_>>>()?;
        let names = instance.source.headers.iter().map(|(n, _)| text(n)).collect::<Result<Vec<_>>>()?;
        let options = Self::options(instance, target).iter().map(|o| text(o)).collect::<Result<Vec<_>>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
        let (headers_raw, names_raw, options_raw) = (pointers(&headers), pointers(&names), pointers(&options));

        let mut program = Program(ptr::null_mut());
        // SAFETY: the library is loaded; every string ends in zero and outlives the call, which copies them; both lists have the stated length.
        let created = unsafe {
            sys::nvrtcCreateProgram(
                &mut program.0,
                source.as_ptr(),
                name.as_ptr(),
                headers_raw.len() as c_int,
                headers_raw.as_ptr(),
                names_raw.as_ptr(),
            )
        };
        if created != nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(&describe(created)));
        }
        // SAFETY: the program is live, the options end in zero and outlive the call.
        let compiled = unsafe { sys::nvrtcCompileProgram(program.0, options_raw.len() as c_int, options_raw.as_ptr()) };
        let log = program.log();
        if compiled != nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(&format!("{}\n{}", describe(compiled), log.trim_end())));
        }
        let mut size = 0;
        // SAFETY: the program is live and compiled, `size` outlives the call.
        let sized = unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) };
        if sized != nvrtcResult::NVRTC_SUCCESS || size == 0 {
            return Err(failed(&format!("it gave no machine code ({})", describe(sized))));
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: `bytes` has the size that the compiler asked for.
        let got = unsafe { sys::nvrtcGetCUBIN(program.0, bytes.as_mut_ptr().cast()) };
        if got != nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(&describe(got)));
        }
        Ok(Cubin { bytes, log })
    }
}

impl Loaded {
    fn new() -> Result<Loaded> {
        let library = NVRTC.open()?;
        let check = |code: nvrtcResult| match code {
            nvrtcResult::NVRTC_SUCCESS => Ok(()),
            code => Err(Error::new(ErrorKind::Unavailable, format!("NVRTC does not start: {}", describe(code)))),
        };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: the library is loaded with every function of `NVRTC`; the numbers outlive the calls.
        check(unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
        // SAFETY: as above.
        check(unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) })?;
        let mut architectures = vec![0 as c_int; count.max(0) as usize];
        // SAFETY: the list has as many places as the compiler said it needs.
        check(unsafe { sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr()) })?;
        let mut architectures: Vec<u32> = architectures.into_iter().filter_map(|a| u32::try_from(a).ok()).collect();
        architectures.sort_unstable();
        Ok(Loaded { _library: library, version: (major.max(0) as u32, minor.max(0) as u32), architectures })
    }
}

/// A program that is destroyed with this value.
struct Program(nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program is live, `size` outlives the call.
        if unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut size) } != nvrtcResult::NVRTC_SUCCESS || size == 0 {
            return String::new();
        }
        let mut log = vec![0u8; size];
        // SAFETY: `log` has the size that the compiler asked for, the closing zero included.
        if unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) } != nvrtcResult::NVRTC_SUCCESS {
            return String::new();
        }
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        String::from_utf8_lossy(&log[..end]).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created by `compile` and destroyed only here.
            unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
        }
    }
}

fn describe(code: nvrtcResult) -> String {
    // SAFETY: codes come from the loaded library; it returns a string of its own that ends in zero and is never freed.
    unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(code)) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_come_from_the_log() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 't' for 'sm_90a'\n\
                   ptxas info    : Function properties for t\n\
                   ptxas         .     256 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 32 registers, used 0 barriers, 256 bytes cumulative stack size\n\
                   ptxas info    : Compiling entry function 'u' for 'sm_90a'\n\
                   ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                   ptxas info    : Used 255 registers, used 1 barriers\n";
        let found = Cubin { bytes: Vec::new(), log: log.into() }.resources();
        let expected = [
            Resources { name: "t".into(), registers: 32, stack_bytes: 256, spill_bytes: 20 },
            Resources { name: "u".into(), registers: 255, stack_bytes: 0, spill_bytes: 0 },
        ];
        assert_eq!(found, expected);
    }
}

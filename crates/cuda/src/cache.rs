//! Compiled kernels, kept on disk between processes and in memory within one.
//!
//! An entry's key is a hash of all that its machine code depends on: the source and every header, the options with macros and target, the
//! compiler's version, this crate's version. An entry is written to a file of its own and renamed into place, so a reader sees
//! all of it or nothing, whoever else writes the same one. One that is cut short or altered is compiled again and replaced.

use std::{
    collections::HashMap,
    ffi::CString,
    fmt, fs,
    io::Write,
    path::{Path, PathBuf},
    process, ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread,
};

use cudarc::driver::sys;
use lawson_core::{Error, Result};
use sha2::{Digest, Sha256};

use crate::{
    device::Device,
    driver::{CUmodule, CUresult, check},
    launch::{Function, Kernel, KernelParams},
    nvrtc::{Instance, Nvrtc},
};

/// Changes when the layout of an entry or the making of a key does.
const FORMAT: u32 = 1;

const MAGIC: &[u8; 8] = b"LAWSONK\x01";

/// Magic, key, length and checksum in front of the machine code.
const HEAD: usize = 8 + 32 + 8 + 32;

/// What a compiled kernel depends on, hashed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of `instance` compiled for `target` by an NVRTC of `version`.
    pub fn new(instance: &Instance, target: &str, version: (u32, u32)) -> Key {
        let mut hash = Sha256::new();
        // Lengths go in front, so that no two lists of parts have the same bytes.
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(&FORMAT.to_le_bytes());
        part(env!("CARGO_PKG_VERSION").as_bytes());
        part(&version.0.to_le_bytes());
        part(&version.1.to_le_bytes());
        part(instance.source.name.as_bytes());
        part(instance.source.text.as_bytes());
        part(&(instance.source.headers.len() as u64).to_le_bytes());
        for (name, text) in instance.source.headers {
            part(name.as_bytes());
            part(text.as_bytes());
        }
        for option in Nvrtc::options(instance, target) {
            part(option.as_bytes());
        }
        Key(hash.finalize().into())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

/// The folder of compiled kernels. That it cannot be read or written is no error: kernels are then compiled in every process.
#[derive(Clone, Debug)]
pub struct DiskCache {
    folder: Option<PathBuf>,
}

impl DiskCache {
    /// In `LAWSON_CACHE_DIR` if that is set, else in the user's folder for caches.
    pub fn standard() -> DiskCache {
        let chosen = std::env::var_os("LAWSON_CACHE_DIR").filter(|v| !v.is_empty()).map(PathBuf::from);
        let usual = || directories::ProjectDirs::from("", "", "lawson").map(|dirs| dirs.cache_dir().to_owned());
        match chosen.or_else(usual) {
            Some(folder) => Self::at(&folder),
            None => DiskCache { folder: None },
        }
    }

    /// In `folder`, in a subfolder for this format.
    pub fn at(folder: &Path) -> DiskCache {
        DiskCache { folder: Some(folder.join(format!("cuda-{FORMAT}"))) }
    }

    /// Where entries are, if anywhere.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    fn path(&self, key: &Key) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{key}.cubin")))
    }

    /// The machine code of `key`, if a whole and unaltered entry is there.
    pub fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let mut entry = fs::read(self.path(key)?).ok()?;
        let head: &[u8; HEAD] = entry.first_chunk()?;
        let (magic, rest) = head.split_at(8);
        let (owner, rest) = rest.split_at(32);
        let (length, checksum) = rest.split_at(8);
        let code = &entry[HEAD..];
        let whole = magic == MAGIC
            && owner == key.0
            && length == (code.len() as u64).to_le_bytes()
            && checksum == Sha256::digest(code).as_slice();
        whole.then(|| entry.split_off(HEAD))
    }

    /// Keeps `code` under `key`, in place of whatever is there; says whether that worked.
    pub fn put(&self, key: &Key, code: &[u8]) -> bool {
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let (Some(folder), Some(path)) = (&self.folder, self.path(key)) else { return false };
        if fs::create_dir_all(folder).is_err() {
            return false;
        }
        // No other writer, in this process or another, has the same temporary name.
        let temporary = folder.join(format!(".{key}.{}.{}", process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed)));
        let write = || -> std::io::Result<()> {
            let mut file = fs::File::options().write(true).create_new(true).open(&temporary)?;
            file.write_all(MAGIC)?;
            file.write_all(&key.0)?;
            file.write_all(&(code.len() as u64).to_le_bytes())?;
            file.write_all(&Sha256::digest(code))?;
            file.write_all(code)?;
            drop(file);
            fs::rename(&temporary, &path)
        };
        let written = write().is_ok();
        if !written {
            // Best effort: what is left would only take space.
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// The entry of `key`, or what `compile` makes, which is then kept.
    ///
    /// # Errors
    /// Those of `compile`.
    pub fn get_or_compile(&self, key: &Key, compile: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        if let Some(code) = self.get(key) {
            return Ok(code);
        }
        let code = compile()?;
        self.put(key, &code);
        Ok(code)
    }
}

/// The code of one instance, loaded on a device; unloaded with the last of its functions.
pub(crate) struct Code {
    module: CUmodule,
    device: Device,
}

// SAFETY: a module is a name that the driver looks up under its own locks, from any thread with the context current.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

impl Code {
    fn load(device: &Device, code: &[u8], instance: &Instance, version: (u32, u32)) -> Result<Arc<Code>> {
        device.bind()?;
        let mut module = ptr::null_mut();
        // SAFETY: the code is a whole cubin, made by NVRTC or kept with its checksum, and outlives the call, which copies it.
        let loaded = unsafe { sys::cuModuleLoadData(&mut module, code.as_ptr().cast()) };
        let driver = device.info().driver_version;
        check(loaded, || {
            let newer = if version > driver {
                format!(
                    " (NVRTC {}.{} is newer than the driver, which supports CUDA {}.{})",
                    version.0, version.1, driver.0, driver.1
                )
            } else {
                String::new()
            };
            format!("loading {instance} on {}{newer}", device.info().name)
        })?;
        Ok(Arc::new(Code { module, device: device.clone() }))
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    fn function(self: &Arc<Self>, kernel: &'static str, instance: &Instance) -> Result<Function> {
        let symbol = CString::new(kernel).map_err(|_| Error::invalid("a zero byte in a kernel's name"))?;
        let mut function = ptr::null_mut();
        self.device.bind()?;
        // SAFETY: the module is live, the name ends in zero.
        let found = unsafe { sys::cuModuleGetFunction(&mut function, self.module, symbol.as_ptr()) };
        check(found, || format!("looking for the kernel {kernel} of {instance}"))?;
        Function::new(function, Arc::clone(self), kernel, instance)
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // Work that is under way may still run this code.
        if self.device.synchronize().is_ok() {
            // SAFETY: loaded by `load`; every `Function` of it holds this value, so none is left.
            let _: CUresult = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// The kernels of one instance, loaded. Clones are the same.
#[derive(Clone, Debug)]
pub struct Module(Arc<[Function]>);

impl Module {
    /// The kernel called `name`.
    ///
    /// # Errors
    /// [`InvalidInput`](lawson_core::ErrorKind::InvalidInput) when its source names none so.
    pub fn function(&self, name: &str) -> Result<&Function> {
        let found = self.0.iter().find(|f| f.kernel() == name);
        found.ok_or_else(|| Error::invalid(format!("there is no kernel {name} among {:?}", self.0)))
    }

    /// The kernel called `name`, which takes one `P`.
    ///
    /// # Errors
    /// As [`Module::function`] and [`Function::typed`].
    pub fn kernel<P: KernelParams>(&self, name: &str) -> Result<Kernel<P>> {
        self.function(name)?.typed()
    }

    /// All of them, in the source's order.
    pub fn functions(&self) -> &[Function] {
        &self.0
    }
}

/// The kernels of one device: compiled when first asked for, in parallel, or taken from the disk. Clones are the same.
#[derive(Clone)]
pub struct Jit(Arc<JitInner>);

struct JitInner {
    device: Device,
    disk: DiskCache,
    nvrtc: Nvrtc,
    target: String,
    loaded: Mutex<HashMap<Key, Module>>,
    compiled: AtomicU32,
}

impl Jit {
    /// Kernels for `device`, kept in `disk`.
    ///
    /// # Errors
    /// [`Unavailable`](lawson_core::ErrorKind::Unavailable) when NVRTC is not installed or cannot compile for this GPU.
    pub fn new(device: &Device, disk: DiskCache) -> Result<Jit> {
        let nvrtc = Nvrtc::load()?;
        let target = nvrtc.target(device.info().compute_capability)?;
        Ok(Jit(Arc::new(JitInner {
            device: device.clone(),
            disk,
            nvrtc,
            target,
            loaded: Mutex::new(HashMap::new()),
            compiled: AtomicU32::new(0),
        })))
    }

    /// The target that kernels are compiled for, such as `sm_90a`.
    pub fn target(&self) -> &str {
        &self.0.target
    }

    /// How many instances this process has compiled for this device, rather than found.
    pub fn compiled(&self) -> u32 {
        self.0.compiled.load(Ordering::Relaxed)
    }

    /// The kernels of each of `instances`. Those that are neither loaded nor on disk are compiled, several at once.
    ///
    /// # Errors
    /// That of the first one, in order, that does not compile or load.
    pub fn load(&self, instances: &[Instance]) -> Result<Vec<Module>> {
        let jit = &*self.0;
        let version = jit.nvrtc.version();
        let keys: Vec<Key> = instances.iter().map(|i| Key::new(i, &jit.target, version)).collect();
        // Held while compiling: whoever else wants the same kernels waits for them instead of compiling them too.
        let mut loaded = jit.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let mut missing: Vec<(Key, &Instance)> = Vec::new();
        for (key, instance) in keys.iter().zip(instances) {
            if !loaded.contains_key(key) && !missing.iter().any(|(k, _)| k == key) {
                missing.push((*key, instance));
            }
        }
        let codes = in_parallel(&missing, |(key, instance)| {
            jit.disk.get_or_compile(key, || {
                jit.compiled.fetch_add(1, Ordering::Relaxed);
                jit.nvrtc.compile(instance, &jit.target).map(|cubin| cubin.bytes)
            })
        });
        for ((key, instance), code) in missing.iter().zip(codes) {
            let code = Code::load(&jit.device, &code?, instance, version)?;
            let functions =
                instance.source.kernels.iter().map(|kernel| code.function(kernel, instance)).collect::<Result<Vec<_>>>()?;
            loaded.insert(*key, Module(functions.into()));
        }
        Ok(keys.iter().map(|key| loaded[key].clone()).collect())
    }
}

/// `work` of each item, in order, on as many threads as the machine has or the items need.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(items.len());
    if threads <= 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    results.sort_unstable_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items() {
        let items: Vec<usize> = (0..100).collect();
        assert_eq!(in_parallel(&items, |i| i * 2), (0..200).step_by(2).collect::<Vec<_>>());
        assert!(in_parallel(&[] as &[usize], |i| *i).is_empty());
    }
}

//! Launching kernels: the only place that does.

use std::{
    ffi::{c_int, c_void},
    fmt,
    marker::PhantomData,
    mem::{MaybeUninit, size_of},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use cudarc::driver::sys::{
    self, CUfunction_attribute as Attribute, CUlaunchAttribute, CUlaunchAttributeID as Id, CUlaunchAttributeValue,
};
use lawson_core::{DType, Error, Result};

use crate::{
    cache::Code,
    device::Device,
    driver::{CUfunction, CUresult, check, human},
    nvrtc::Instance,
};

/// Shared memory that a block gets without opting in.
const SHARED_WITHOUT_OPT_IN: u32 = 48 * 1024;

/// Blocks in a cluster that every GPU with clusters takes.
const PORTABLE_CLUSTER: u32 = 8;

/// The one parameter of a kernel, passed by value.
///
/// # Safety
/// The type is `#[repr(C)]` and has the fields of the kernel's parameter struct, in order and of the same sizes, with no padding that the
/// kernel reads.
pub unsafe trait KernelParams: Copy + Send + Sync + 'static {}

/// A kernel on a device. Clones are the same kernel.
#[derive(Clone)]
pub struct Function(Arc<Loaded>);

struct Loaded {
    function: CUfunction,
    code: Arc<Code>,
    kernel: &'static str,
    /// Kernel and macros.
    name: String,
    registers: u32,
    local_bytes: u32,
    static_shared: u32,
    max_threads: u32,
    /// Dynamic shared memory opted in to so far.
    opted_in: AtomicU32,
    /// Largest cluster allowed so far.
    cluster: AtomicU32,
}

// SAFETY: a function is a name that the driver looks up under its own locks, from any thread with the context current; the module it is
// part of is kept.
unsafe impl Send for Loaded {}
// SAFETY: as above; what changes is atomic.
unsafe impl Sync for Loaded {}

impl Function {
    pub(crate) fn new(function: CUfunction, code: Arc<Code>, kernel: &'static str, instance: &Instance) -> Result<Function> {
        let name = instance.named(kernel);
        let attribute = |attribute: Attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: the function is live with its module, `value` outlives the call.
            check(unsafe { sys::cuFuncGetAttribute(&mut value, attribute, function) }, || format!("asking about {name}"))?;
            Ok(value.max(0) as u32)
        };
        let registers = attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?;
        let local_bytes = attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?;
        let static_shared = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let max_threads = attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        let opted_in = AtomicU32::new(SHARED_WITHOUT_OPT_IN.saturating_sub(static_shared));
        let cluster = AtomicU32::new(PORTABLE_CLUSTER);
        Ok(Function(Arc::new(Loaded {
            function,
            code,
            kernel,
            name,
            registers,
            local_bytes,
            static_shared,
            max_threads,
            opted_in,
            cluster,
        })))
    }

    /// Its name in the source.
    pub fn kernel(&self) -> &'static str {
        self.0.kernel
    }

    /// Kernel and macros.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Registers of one thread.
    pub fn registers(&self) -> u32 {
        self.0.registers
    }

    /// Bytes of local memory of one thread: arrays and spilled registers.
    pub fn local_bytes(&self) -> u32 {
        self.0.local_bytes
    }

    /// Most threads of one block.
    pub fn max_threads(&self) -> u32 {
        self.0.max_threads
    }

    /// The device it is on.
    pub fn device(&self) -> &Device {
        self.0.code.device()
    }

    /// This kernel with parameters of type `P`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](lawson_core::ErrorKind::InvalidInput) when the kernel's parameter does not have the size of
    /// `P`; drivers older than CUDA 12.4 cannot tell.
    pub fn typed<P: KernelParams>(&self) -> Result<Kernel<P>> {
        if let Some(size) = self.parameter_size()
            && size != size_of::<P>()
        {
            return Err(Error::invalid(format!("{} takes a parameter of {size} bytes, not of {}", self.0.name, size_of::<P>())));
        }
        Ok(Kernel { function: self.clone(), params: PhantomData })
    }

    /// Bytes of the first parameter, if the driver can tell.
    fn parameter_size(&self) -> Option<usize> {
        self.device().bind().ok()?;
        // SAFETY: a device is open, so the driver is loaded; the address is only compared with null.
        unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"cuFuncGetParamInfo\0") }.ok()?;
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the driver has the function, as was just seen; kernel and numbers outlive the call.
        let told = unsafe { sys::cuFuncGetParamInfo(self.0.function, 0, &mut offset, &mut size) };
        (told == CUresult::CUDA_SUCCESS).then_some(size)
    }

    /// How many blocks of `threads` threads and `shared` bytes of dynamic shared memory one multiprocessor runs at once.
    ///
    /// # Errors
    /// As [`Kernel::launch`], for shared memory.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32> {
        self.device().bind()?;
        self.allow_shared(shared)?;
        let mut blocks = 0;
        // SAFETY: the function is live, `blocks` outlives the call.
        let asked = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, self.0.function, threads as c_int, shared as usize)
        };
        check(asked, || format!("asking for the occupancy of {}", self.0.name))?;
        Ok(blocks.max(0) as u32)
    }

    /// Opts in to `bytes` of dynamic shared memory, once.
    fn allow_shared(&self, bytes: u32) -> Result<()> {
        if bytes <= self.0.opted_in.load(Ordering::Relaxed) {
            return Ok(());
        }
        let most = self.device().info().shared_memory_per_block.saturating_sub(self.0.static_shared);
        if bytes > most {
            let (asked, most, device) = (human(bytes.into()), human(most.into()), &self.device().info().name);
            return Err(Error::invalid(format!(
                "{} needs {asked} of shared memory, and a block has {most} on {device}",
                self.0.name
            )));
        }
        // SAFETY: the function is live. The limit only grows the set of allowed launches, so setting it twice does no harm.
        let set = unsafe {
            sys::cuFuncSetAttribute(self.0.function, Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most as c_int)
        };
        check(set, || format!("opting in to {} of shared memory for {}", human(most.into()), self.0.name))?;
        self.0.opted_in.store(most, Ordering::Relaxed);
        Ok(())
    }

    /// Allows clusters of `blocks` blocks, once.
    fn allow_cluster(&self, blocks: u32) -> Result<()> {
        if blocks <= self.0.cluster.load(Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: as in `allow_shared`.
        let set = unsafe {
            sys::cuFuncSetAttribute(self.0.function, Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
        };
        check(set, || format!("allowing clusters of {blocks} blocks for {}", self.0.name))?;
        self.0.cluster.store(u32::MAX, Ordering::Relaxed);
        Ok(())
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (registers, local) = (self.0.registers, self.0.local_bytes);
        write!(f, "Function({}, {registers} registers, {local} bytes of local memory)", self.0.name)
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z; none in one of them is no launch.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Blocks of a cluster in x, y and z; [1, 1, 1] is none.
    pub cluster: [u32; 3],
    /// All blocks run at once, so that they can wait for each other.
    pub cooperative: bool,
    /// Programmatic dependent launch: blocks may start while the kernel before is still running, and wait for it with
    /// `griddepcontrol.wait`. GPUs before compute capability 9.0 start them in order, as if this were false.
    pub overlaps_previous: bool,
}

impl Launch {
    /// `grid` blocks of `threads` threads, and nothing else.
    pub fn new(grid: [u32; 3], threads: u32) -> Launch {
        Launch { grid, block: [threads, 1, 1], shared: 0, cluster: [1; 3], cooperative: false, overlaps_previous: false }
    }

    /// With `bytes` of dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Launch {
        Launch { shared: bytes, ..self }
    }

    /// In clusters of `blocks`.
    pub fn cluster(self, blocks: [u32; 3]) -> Launch {
        Launch { cluster: blocks, ..self }
    }

    /// With all blocks at once.
    pub fn cooperative(self) -> Launch {
        Launch { cooperative: true, ..self }
    }

    /// Overlapping the kernel before.
    pub fn overlapping_previous(self) -> Launch {
        Launch { overlaps_previous: true, ..self }
    }
}

/// A kernel that takes one `P`.
pub struct Kernel<P> {
    function: Function,
    params: PhantomData<fn(P)>,
}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        Kernel { function: self.function.clone(), params: PhantomData }
    }
}

impl<P> fmt::Debug for Kernel<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.function.fmt(f)
    }
}

impl<P: KernelParams> Kernel<P> {
    /// The kernel, without its type.
    pub fn function(&self) -> &Function {
        &self.function
    }

    /// Enqueues the kernel; `problem` stands in the message when that fails.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](lawson_core::ErrorKind::InvalidInput) when a block cannot have that much shared memory;
    /// [`ErrorKind::Device`](lawson_core::ErrorKind::Device) with kernel, problem and the driver's word. A fault of the running kernel is
    /// reported by [`Device::synchronize`], or here when `LAWSON_CUDA_SYNC=1`.
    ///
    /// # Safety
    /// With these `params` and this `launch` the kernel touches only memory that is alive on its device until the work enqueued
    /// now is done, and nothing else uses what it writes except through the device's stream.
    pub unsafe fn launch(&self, launch: &Launch, params: &P, problem: &dyn fmt::Display) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let function = &self.function;
        let device = function.device();
        device.bind()?;
        function.allow_shared(launch.shared).map_err(|e| e.at(problem))?;
        let hopper = device.info().compute_capability.0 >= 9;

        let attribute = |id: Id, value: CUlaunchAttributeValue| CUlaunchAttribute { id, pad: [0; 4], value };
        let mut attributes = [const { MaybeUninit::<CUlaunchAttribute>::uninit() }; 3];
        let mut count = 0;
        let mut add = |a: CUlaunchAttribute| {
            attributes[count].write(a);
            count += 1;
        };
        if launch.cluster != [1; 3] {
            let [x, y, z] = launch.cluster;
            function.allow_cluster(x.saturating_mul(y).saturating_mul(z))?;
            let value = CUlaunchAttributeValue { clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z } };
            add(attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value));
        }
        if launch.cooperative {
            add(attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, CUlaunchAttributeValue { cooperative: 1 }));
        }
        if launch.overlaps_previous && hopper {
            let value = CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
            add(attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value));
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared,
            hStream: device.raw_stream(),
            attrs: attributes.as_mut_ptr().cast(),
            numAttrs: count as u32,
        };
        let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the function is live with its module; the first `count` attributes are written; the kernel takes one parameter, which has the
        // size of `P` (`Function::typed`) and its layout (`KernelParams`) and is copied by the call. What the kernel does is the caller's claim.
        let launched = unsafe { sys::cuLaunchKernelEx(&config, function.0.function, arguments.as_mut_ptr(), ptr::null_mut()) };
        check(launched, || format!("{problem}: launching {} with {launch:?}", function.0.name))?;
        if device.waits_for_each_launch() {
            device.wait().map_err(|e| e.at(format_args!("{problem}: {}", function.0.name)))?;
        }
        Ok(())
    }
}

/// How the bulk copy engine permutes 16-byte pieces within the rows of a box in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// Within 32 bytes; the box's inner extent is at most that.
    B32,
    /// Within 64 bytes.
    B64,
    /// Within 128 bytes.
    B128,
}

/// A tensor as the bulk copy engine sees it, for a field of a kernel's parameters (`struct alignas(64) TensorMap { unsigned long long
/// opaque[16]; }`, first in the struct).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// A tensor of `dims` elements of `dtype`, innermost first, at device address `base`; `strides` are bytes from one index to the next of
    /// every dimension but the innermost, multiples of 16. Boxes of `tile` elements are copied; what lies outside the tensor is
    /// read as 0.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](lawson_core::ErrorKind::InvalidInput) when the numbers do not go together.
    pub fn tiled(
        device: &Device,
        dtype: DType,
        base: u64,
        dims: &[u64],
        strides: &[u64],
        tile: &[u32],
        swizzle: Swizzle,
    ) -> Result<TensorMap> {
        let rank = dims.len();
        let wrong =
            |what: &str| Error::invalid(format!("a tensor map of dims {dims:?}, strides {strides:?}, tile {tile:?}: {what}"));
        if !(1..=5).contains(&rank) || strides.len() != rank - 1 || tile.len() != rank {
            return Err(wrong("1 to 5 dimensions, one stride fewer, and as many extents of the tile are needed"));
        }
        if !base.is_multiple_of(16) || strides.iter().any(|s| !s.is_multiple_of(16)) {
            return Err(wrong("the address and the strides must be multiples of 16 bytes"));
        }
        if dims.contains(&0) || tile.iter().any(|t| !(1..=256).contains(t)) {
            return Err(wrong("dimensions are at least 1 and a tile's extents 1 to 256"));
        }
        use sys::{CUtensorMapDataType as Type, CUtensorMapSwizzle as Swizzled};
        let dtype = match dtype {
            DType::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::BF16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            other => return Err(wrong(&format!("no tensor map has the dtype {other}"))),
        };
        let swizzle = match swizzle {
            Swizzle::None => Swizzled::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => Swizzled::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => Swizzled::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => Swizzled::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        device.bind()?;
        let mut map = TensorMap([0; 16]);
        let steps = [1u32; 5];
        // SAFETY: the lists have `rank`, `rank - 1` and `rank` elements, as checked, and `steps` at least as many; the map has the 128 bytes
        // and the alignment of 64 that the driver documents. The address is stored, not read.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map).cast(),
                dtype,
                rank as u32,
                base as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                // 256 bytes cost a stream of rows from memory 8 % of its speed, and win nothing where they come from second-level cache.
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        if encoded == CUresult::CUDA_ERROR_INVALID_VALUE {
            return Err(wrong("the driver refuses it"));
        }
        check(encoded, || "making a tensor map".into())?;
        Ok(map)
    }
}

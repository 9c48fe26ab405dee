//! Matrix products by cuBLASLt, in row-major terms.
//!
//! `D[m, n] = α · A[m, k] · B + β · C[m, n] + bias[n]`, where B is given as `[n, k]` (a projection's weights, the keys) or as `[k, n]` (the
//! values).
//! cuBLASLt computes the transposed product, whose column-major matrices are these row-major ones.
//!
//! An algorithm is chosen once per shape by the library's heuristics and kept, so the same plan gives the same bits on every run. Splits of k
//! are added up from a workspace in f32 and in a fixed order, never in place and never in the output's type. f32 is true f32. bf16 and f16
//! are accumulated in f32.

use std::{
    collections::HashMap,
    ffi::{CStr, c_int, c_void},
    fmt,
    mem::size_of,
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, cublasLtReductionScheme_t,
    cublasStatus_t, cudaDataType_t,
};
use lawson_core::{DType, Error, ErrorKind, Result};
use libloading::Library;

use crate::{
    buffer::DeviceBuffer,
    device::Device,
    driver::{Shared, human},
};

const CUBLASLT: Shared = Shared {
    stem: "cublasLt",
    absent: "cuBLASLt, NVIDIA's matrix library, was not found (libcublasLt.so.13 or .12): `pip install nvidia-cublas` (CUDA 12: \
             nvidia-cublas-cu12) or the distribution's package has it; its folder must be on LD_LIBRARY_PATH or known to ldconfig",
    functions: &[
        "cublasLtCreate",
        "cublasLtDestroy",
        "cublasLtGetVersion",
        "cublasLtGetStatusString",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoConfigGetAttribute",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatrixLayoutSetAttribute",
    ],
};

/// `CUBLAS_OP_N` and `CUBLAS_OP_T` of cublas_api.h.
const AS_IT_IS: i32 = 0;
const TRANSPOSED: i32 = 1;

/// Heuristics asked for; the first that works is taken.
const CANDIDATES: usize = 8;

/// Most workspace that an algorithm may take: what NVIDIA recommends for Hopper and later, and before.
const WORKSPACE_HOPPER: usize = 32 << 20;
const WORKSPACE_BEFORE: usize = 4 << 20;

/// Loads the library, once.
///
/// # Errors
/// [`ErrorKind::Unavailable`] when it is not installed.
pub(crate) fn load() -> Result<()> {
    static LIBRARY: std::sync::OnceLock<Result<Library>> = std::sync::OnceLock::new();
    // Kept open so that the bindings find it; never unloaded.
    LIBRARY.get_or_init(|| CUBLASLT.open()).as_ref().map(|_| ()).map_err(Clone::clone)
}

#[inline]
fn check(status: cublasStatus_t, doing: impl FnOnce() -> String) -> Result<()> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let kind = if status == cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED { ErrorKind::OutOfMemory } else { ErrorKind::Device };
    // SAFETY: statuses come from the loaded library; it returns a string of its own that ends in zero and is never freed.
    let text = unsafe { CStr::from_ptr(sys::cublasLtGetStatusString(status)) }.to_string_lossy();
    Err(Error::new(kind, format!("{}: cuBLASLt says {text}", doing())))
}

/// One level of a batch: how many products, and elements from one to the next in each operand (0: the same one).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    /// Products.
    pub count: usize,
    /// From one A to the next.
    pub a: i64,
    /// From one B to the next.
    pub b: i64,
    /// From one C to the next.
    pub c: i64,
    /// From one D to the next.
    pub d: i64,
}

impl Batch {
    /// A single product.
    pub const ONE: Batch = Batch { count: 1, a: 0, b: 0, c: 0, d: 0 };

    fn strides(&self) -> [i64; 4] {
        [self.a, self.b, self.c, self.d]
    }
}

/// How B lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// `[n, k]`: a row is an output. Weights, keys.
    Rows,
    /// `[k, n]`: a column is an output. Values.
    Columns,
}

/// What is multiplied. All of it but the addresses is the key of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Rows of A and D.
    pub m: usize,
    /// Columns of D.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// Type of A and B.
    pub dtype: DType,
    /// Type of C, D and bias: `dtype`, or f32.
    pub out: DType,
    /// Layout of B.
    pub b: Operand,
    /// Elements from a row of A to the next.
    pub lda: usize,
    /// Elements from a row of B, as it lies in memory, to the next.
    pub ldb: usize,
    /// Elements from a row of C to the next.
    pub ldc: usize,
    /// Elements from a row of D to the next.
    pub ldd: usize,
    /// Whether a bias of n elements is added to every row. It is of type `out`: cuBLASLt takes no other for these types.
    pub bias: bool,
    /// Whether C is added, a residual say. It may be D itself; the library then may take another way, as exact and the same on every run, but not
    /// to the same bits as with C elsewhere.
    pub residual: bool,
    /// Outer and inner batch: sequences or key/value heads, and the query heads that share one. cuBLASLt has one level; two that do not
    /// lie at equal distances become several calls.
    pub batch: [Batch; 2],
    /// Every address, and every step between the products of a batch, is a multiple of this many bytes; a power of
    /// two. That they are multiples of their elements goes without saying.
    pub alignment: usize,
}

impl Matmul {
    /// `y[m, n] = x[m, k] · W[n, k]ᵀ`, everything contiguous and one dtype.
    pub fn projection(m: usize, n: usize, k: usize, dtype: DType) -> Matmul {
        Matmul {
            m,
            n,
            k,
            dtype,
            out: dtype,
            b: Operand::Rows,
            lda: k,
            ldb: k,
            ldc: n,
            ldd: n,
            bias: false,
            residual: false,
            batch: [Batch::ONE; 2],
            alignment: 256,
        }
    }

    /// Operations, a multiplication and an addition counting as two.
    pub fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64 * (self.batch[0].count * self.batch[1].count) as f64
    }

    fn validate(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::invalid(format!("{self}: {what}")));
        let columns_of_b = if self.b == Operand::Rows { self.k } else { self.n };
        if self.m == 0 || self.n == 0 || self.k == 0 {
            return wrong("m, n and k are at least 1");
        }
        if self.lda < self.k || self.ldb < columns_of_b || self.ldd < self.n || (self.residual && self.ldc < self.n) {
            return wrong("a leading dimension is less than a row");
        }
        if [self.m, self.n, self.k, self.lda, self.ldb, self.ldc, self.ldd].iter().any(|&x| x > c_int::MAX as usize) {
            return wrong("cuBLASLt takes dimensions below 2^31");
        }
        if self.out != self.dtype && self.out != DType::F32 {
            return wrong("the result has the dtype of the inputs or f32");
        }
        if !self.alignment.is_power_of_two() {
            return wrong("the alignment is a power of two");
        }
        Ok(())
    }

    /// The batch as one level for cuBLASLt, and one of separate calls.
    fn levels(&self) -> (Batch, Batch) {
        let [outer, inner] = self.batch;
        if outer.count <= 1 {
            return (inner, outer);
        }
        if inner.count <= 1 {
            return (outer, inner);
        }
        let even = outer.strides().iter().zip(inner.strides()).all(|(&o, i)| o == i * inner.count as i64);
        if even {
            return (Batch { count: outer.count * inner.count, ..inner }, Batch::ONE);
        }
        if outer.count >= inner.count { (outer, inner) } else { (inner, outer) }
    }
}

impl fmt::Display for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "product m={} n={} k={} {}", self.m, self.n, self.k, self.dtype)?;
        if self.out != self.dtype {
            write!(f, " to {}", self.out)?;
        }
        if self.b == Operand::Columns {
            f.write_str(" B=[k,n]")?;
        }
        let count = self.batch[0].count * self.batch[1].count;
        if count != 1 {
            write!(f, " batch={count}")?;
        }
        if self.bias {
            f.write_str(" +bias")?;
        }
        if self.residual {
            f.write_str(" +residual")?;
        }
        Ok(())
    }
}

/// Addresses on the device, and the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operands {
    /// A, `[m, k]`.
    pub a: u64,
    /// B, `[n, k]` or `[k, n]`.
    pub b: u64,
    /// The bias, n elements, where the product has one.
    pub bias: u64,
    /// C, `[m, n]`, where the product has a residual.
    pub c: u64,
    /// D, `[m, n]`.
    pub d: u64,
    /// α.
    pub scale: f32,
}

impl Operands {
    /// A, B and D alone, not scaled.
    pub fn new(a: u64, b: u64, d: u64) -> Operands {
        Operands { a, b, bias: 0, c: 0, d, scale: 1.0 }
    }
}

/// cuBLASLt on one device, with its plans. Clones are the same.
#[derive(Clone)]
pub struct Blas(Arc<Inner>);

struct Inner {
    handle: cublasLtHandle_t,
    device: Device,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    plans: HashMap<Matmul, Arc<MatmulPlan>>,
    /// As large as any plan so far needs. A plan keeps the one it was made with, so that graphs stay valid when this is replaced by a larger one.
    workspace: Option<Arc<DeviceBuffer>>,
}

// SAFETY: NVIDIA documents that a handle may be used by several threads at once.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `Blas::new`; every plan holds this value, so none is left.
            unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}

impl Blas {
    /// # Errors
    /// [`ErrorKind::Unavailable`] when cuBLASLt is not installed.
    pub fn new(device: &Device) -> Result<Blas> {
        load()?;
        device.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the library is loaded, a context is current, `handle` outlives the call.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, || format!("starting cuBLASLt on {}", device.info().name))?;
        Ok(Blas(Arc::new(Inner { handle, device: device.clone(), state: Mutex::default() })))
    }

    /// The library's version, such as 130100 for 13.1.0.
    pub fn version(&self) -> usize {
        // SAFETY: the library is loaded, since a handle exists.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Bytes of the workspace that the plans so far share, part of the device's memory in use.
    pub fn workspace_bytes(&self) -> usize {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).workspace.as_ref().map_or(0, |w| w.bytes())
    }

    /// How to compute `matmul`: chosen at its first use, kept for every other.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when its numbers do not go together; [`ErrorKind::Device`] when cuBLASLt has no algorithm for it.
    pub fn plan(&self, matmul: &Matmul) -> Result<Arc<MatmulPlan>> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = state.plans.get(matmul) {
            return Ok(Arc::clone(plan));
        }
        matmul.validate()?;
        self.0.device.bind()?;
        let mut plan = MatmulPlan::new(self, matmul)?;
        if plan.workspace_bytes > 0 {
            let enough = state.workspace.as_ref().filter(|w| w.bytes() >= plan.workspace_bytes).cloned();
            let workspace = match enough {
                Some(workspace) => workspace,
                None => {
                    let what = || format!("{matmul}: workspace of {}", human(plan.workspace_bytes as u64));
                    Arc::new(self.0.device.alloc(plan.workspace_bytes).map_err(|e| e.at(what()))?)
                }
            };
            state.workspace = Some(Arc::clone(&workspace));
            plan.workspace = Some(workspace);
        }
        let plan = Arc::new(plan);
        state.plans.insert(*matmul, Arc::clone(&plan));
        Ok(plan)
    }
}

/// A product with its algorithm.
pub struct MatmulPlan {
    blas: Blas,
    matmul: Matmul,
    /// The description holds the address of the bias, so one call at a time sets and uses it.
    description: Mutex<Description>,
    layouts: [Layout; 4],
    algorithm: cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
    workspace: Option<Arc<DeviceBuffer>>,
    /// Separate calls.
    calls: Batch,
}

// SAFETY: layouts and the algorithm are only read after `new`, the description only under its lock.
unsafe impl Send for MatmulPlan {}
// SAFETY: as above.
unsafe impl Sync for MatmulPlan {}

struct Description {
    raw: cublasLtMatmulDesc_t,
    bias: u64,
}

impl Description {
    fn set<T>(&self, attribute: cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the description is live, `value` has the stated size and outlives the call, which copies it.
        let set =
            unsafe { sys::cublasLtMatmulDescSetAttribute(self.raw, attribute, ptr::from_ref(value).cast(), size_of::<T>()) };
        check(set, || format!("setting {attribute:?}"))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: created by `MatmulPlan::new`, destroyed only here.
        unsafe { sys::cublasLtMatmulDescDestroy(self.raw) };
    }
}

/// A matrix as cuBLASLt sees it.
struct Layout(cublasLtMatrixLayout_t);

impl Layout {
    /// `rows` numbers lie next to each other, `columns` times at a distance of `ld`.
    fn new(dtype: DType, rows: usize, columns: usize, ld: usize, batch: usize, stride: i64) -> Result<Layout> {
        use cublasLtMatrixLayoutAttribute_t as Attribute;
        let mut layout = Layout(ptr::null_mut());
        // SAFETY: the library is loaded, the place outlives the call; `drop` destroys the layout.
        let made =
            unsafe { sys::cublasLtMatrixLayoutCreate(&mut layout.0, data_type(dtype)?, rows as u64, columns as u64, ld as i64) };
        check(made, || "describing a matrix".into())?;
        if batch > 1 {
            layout.set(Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &(batch as i32))?;
            layout.set(Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride)?;
        }
        Ok(layout)
    }

    fn set<T>(&self, attribute: cublasLtMatrixLayoutAttribute_t, value: &T) -> Result<()> {
        // SAFETY: the layout is live, `value` has the stated size and outlives the call, which copies it.
        let set =
            unsafe { sys::cublasLtMatrixLayoutSetAttribute(self.0, attribute, ptr::from_ref(value).cast(), size_of::<T>()) };
        check(set, || format!("setting {attribute:?}"))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created by `new`, destroyed only here.
            unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
        }
    }
}

struct Preference(cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(&self, attribute: cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the preference is live, `value` has the stated size and outlives the call, which copies it.
        let set =
            unsafe { sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, ptr::from_ref(value).cast(), size_of::<T>()) };
        check(set, || format!("setting {attribute:?}"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created by `MatmulPlan::new`, destroyed only here.
            unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
        }
    }
}

fn data_type(dtype: DType) -> Result<cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Ok(cudaDataType_t::CUDA_R_16BF),
        DType::F16 => Ok(cudaDataType_t::CUDA_R_16F),
        other => Err(Error::invalid(format!("no matrix product in {other}"))),
    }
}

impl MatmulPlan {
    fn new(blas: &Blas, matmul: &Matmul) -> Result<MatmulPlan> {
        use cublasLtMatmulDescAttributes_t as Desc;
        use cublasLtMatmulPreferenceAttributes_t as Pref;
        let doing = || format!("planning the {matmul}");
        let &Matmul { m, n, k, dtype, out, lda, ldb, ldc, ldd, .. } = matmul;
        let (batch, calls) = matmul.levels();

        let mut description = Description { raw: ptr::null_mut(), bias: 0 };
        // SAFETY: the library is loaded, the place outlives the call; `drop` destroys the description.
        let made = unsafe {
            sys::cublasLtMatmulDescCreate(
                &mut description.raw,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType_t::CUDA_R_32F,
            )
        };
        check(made, doing)?;
        // Dᵀ = op(B) · Aᵀ in column-major terms: B comes first, and [n, k] in rows is [k, n] in columns, to be transposed.
        let operation = if matmul.b == Operand::Rows { TRANSPOSED } else { AS_IT_IS };
        description.set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, &operation)?;
        if matmul.bias {
            description.set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            description.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(out)?)?;
        }
        let (rows, columns) = if matmul.b == Operand::Rows { (k, n) } else { (n, k) };
        let ldc = if matmul.residual { ldc } else { ldd };
        let layouts = [
            Layout::new(dtype, rows, columns, ldb, batch.count, batch.b)?,
            Layout::new(dtype, k, m, lda, batch.count, batch.a)?,
            Layout::new(out, n, m, ldc, batch.count, if matmul.residual { batch.c } else { batch.d })?,
            Layout::new(out, n, m, ldd, batch.count, batch.d)?,
        ];

        let mut preference = Preference(ptr::null_mut());
        // SAFETY: the library is loaded, the place outlives the call; `drop` destroys the preference.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut preference.0) }, doing)?;
        let hopper = blas.0.device.info().compute_capability.0 >= 9;
        let most = if hopper { WORKSPACE_HOPPER } else { WORKSPACE_BEFORE };
        preference.set(Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most)?;
        // Splits of k may only be reduced in f32, out of place.
        let schemes = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        for (which, dtype) in [
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, dtype),
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, dtype),
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            preference.set(which, &(matmul.alignment.clamp(dtype.size(), 256) as u32))?;
        }

        // SAFETY: all bytes zero is a value of this struct of numbers; status 0 is success.
        let mut found: [cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        let [b, a, c, d] = &layouts;
        // SAFETY: handle, description, layouts and preference are live; the list has as many places as are asked for.
        let asked = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                blas.0.handle,
                description.raw,
                b.0,
                a.0,
                c.0,
                d.0,
                preference.0,
                CANDIDATES as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        check(asked, doing)?;
        let works =
            |r: &&cublasLtMatmulHeuristicResult_t| r.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS && r.workspaceSize <= most;
        let best = found[..count.clamp(0, CANDIDATES as c_int) as usize].iter().find(works);
        let best = best.ok_or_else(|| Error::new(ErrorKind::Device, format!("{}: cuBLASLt has no algorithm for it", doing())))?;
        Ok(MatmulPlan {
            blas: blas.clone(),
            matmul: *matmul,
            description: Mutex::new(description),
            algorithm: best.algo,
            workspace_bytes: best.workspaceSize,
            workspace: None,
            layouts,
            calls,
        })
    }

    /// What it computes.
    pub fn matmul(&self) -> &Matmul {
        &self.matmul
    }

    /// Launches of cuBLASLt that one [`MatmulPlan::run`] makes.
    pub fn calls(&self) -> usize {
        self.calls.count.max(1)
    }

    /// Bytes of workspace that its algorithm uses.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The algorithm, in the library's numbers.
    pub fn algorithm(&self) -> String {
        use sys::cublasLtMatmulAlgoConfigAttributes_t as Config;
        let number = |attribute| {
            let (mut value, mut written) = (0i32, 0usize);
            let place = ptr::from_mut(&mut value).cast();
            // SAFETY: the algorithm came from the library; `value` has the stated size and both outlive the call.
            unsafe {
                sys::cublasLtMatmulAlgoConfigGetAttribute(&self.algorithm, attribute, place, size_of::<i32>(), &mut written)
            };
            value
        };
        format!(
            "algorithm {} tile {} stages {} splits {} reduction {}",
            number(Config::CUBLASLT_ALGO_CONFIG_ID),
            number(Config::CUBLASLT_ALGO_CONFIG_TILE_ID),
            number(Config::CUBLASLT_ALGO_CONFIG_STAGES_ID),
            number(Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
            number(Config::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
        )
    }

    /// Enqueues the product.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when an address is missing or less aligned than planned; [`ErrorKind::Device`] with the library's word.
    ///
    /// # Safety
    /// The addresses are of matrices on the plan's device with the planned sizes, strides and types, alive until the work enqueued now is
    /// done; D overlaps none of the others, but may be C if `ldc = ldd`; nothing else uses D except through the device's stream.
    pub unsafe fn run(&self, operands: &Operands) -> Result<()> {
        let Operands { a, b, bias, c, d, scale } = *operands;
        let c = if self.matmul.residual { c } else { d };
        let bias = if self.matmul.bias { bias } else { 0 };
        if (a | b | c | d) & (self.matmul.alignment as u64 - 1) != 0
            || a == 0
            || b == 0
            || c == 0
            || d == 0
            || (self.matmul.bias && bias == 0)
        {
            return Err(Error::invalid(format!(
                "{}: {operands:x?} are not all addresses aligned to {} bytes",
                self.matmul, self.matmul.alignment
            )));
        }
        let blas = &*self.blas.0;
        blas.device.bind()?;
        let beta = if self.matmul.residual { 1.0f32 } else { 0.0 };
        let (workspace, workspace_bytes) = self.workspace.as_ref().map_or((0, 0), |w| (w.ptr(), self.workspace_bytes));
        let [layout_b, layout_a, layout_c, layout_d] = &self.layouts;
        let (size, out) = (self.matmul.dtype.size() as i64, self.matmul.out.size() as i64);
        let mut description = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        if bias != description.bias {
            description.set(cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
            description.bias = bias;
        }
        for call in 0..self.calls.count.max(1) as i64 {
            let at = |base: u64, stride: i64, size: i64| base.wrapping_add_signed(call * stride * size);
            // SAFETY: handle, description and layouts are live, the algorithm was made for them; scales outlive the call, which reads
            // them on the host; the workspace is as large as the algorithm asked for, and used by this stream alone. The matrices are the caller's claim.
            let status = unsafe {
                sys::cublasLtMatmul(
                    blas.handle,
                    description.raw,
                    ptr::from_ref(&scale).cast(),
                    at(b, self.calls.b, size) as *const c_void,
                    layout_b.0,
                    at(a, self.calls.a, size) as *const c_void,
                    layout_a.0,
                    ptr::from_ref(&beta).cast(),
                    at(c, if self.matmul.residual { self.calls.c } else { self.calls.d }, out) as *const c_void,
                    layout_c.0,
                    at(d, self.calls.d, out) as *mut c_void,
                    layout_d.0,
                    &self.algorithm,
                    workspace as *mut c_void,
                    workspace_bytes,
                    blas.device.raw_stream().cast(),
                )
            };
            check(status, || format!("enqueueing the {}", self.matmul))?;
        }
        Ok(())
    }
}

impl fmt::Debug for MatmulPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "MatmulPlan({}, {}, {} calls, workspace of {} bytes)",
            self.matmul,
            self.algorithm(),
            self.calls(),
            self.workspace_bytes
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_levels_at_equal_distances_become_one() {
        let step = |count, s: i64| Batch { count, a: s, b: 2 * s, c: 3 * s, d: 3 * s };
        let matmul = |outer, inner| Matmul { batch: [outer, inner], ..Matmul::projection(1, 1, 1, DType::F32) };
        assert_eq!(matmul(step(3, 40), step(4, 10)).levels(), (Batch { count: 12, ..step(4, 10) }, Batch::ONE));
        // Query heads of a group share b, so the distances are not equal.
        let shared = Batch { b: 0, ..step(4, 10) };
        assert_eq!(matmul(step(8, 40), shared).levels(), (step(8, 40), shared));
        assert_eq!(matmul(step(2, 40), shared).levels(), (shared, step(2, 40)));
        assert_eq!(matmul(Batch::ONE, step(4, 10)).levels(), (step(4, 10), Batch::ONE));
    }

    #[test]
    fn impossible_products_are_refused() {
        let good = Matmul::projection(3, 5, 7, DType::BF16);
        assert!(good.validate().is_ok());
        let bad = [
            Matmul { m: 0, ..good },
            Matmul { lda: 6, ..good },
            Matmul { ldb: 6, ..good },
            Matmul { b: Operand::Columns, ldb: 4, ..good },
            Matmul { ldd: 4, ..good },
            Matmul { ldc: 4, residual: true, ..good },
            Matmul { out: DType::F16, ..good },
            Matmul { alignment: 3, ..good },
            Matmul { n: 1 << 31, ldd: 1 << 31, ..good },
        ];
        for m in bad {
            assert_eq!(m.validate().expect_err("refused").kind(), ErrorKind::InvalidInput, "{m:?}");
        }
    }
}

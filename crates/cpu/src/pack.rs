//! Weights packed once, when a block is built, in the layout that `kernels::gemm` reads.

use lawson_core::{
    DType, Error, ErrorKind, Result, Storage, TensorRef,
    int8::{check_inputs, quantise},
};

use crate::{
    arena::AlignedBytes,
    dispatch::Kernels,
    kernels::{gemm::Weights, rows::with_elem},
    machine::Memory,
    simd::{DOT_STEPS, Elem, INT8_BLOCK},
    threads::Threads,
};

/// A weight matrix [n, k] in column tiles and panels.
pub struct PackedMatrix {
    bytes: AlignedBytes,
    dtype: DType,
    n: usize,
    k: usize,
    tile_columns: usize,
    panel: usize,
    pairs: bool,
    /// In int8, steps that stand side by side for each output.
    int8: Option<usize>,
    /// Scales of int8, `[n]`.
    scales: Vec<f32>,
}

/// Columns of a tile that holds whole units (heads) of `unit` columns: about 256, with little padding to whole panels.
pub fn tile_columns(unit: usize, n: usize, panel: usize) -> usize {
    let most = (512 / unit).max(1);
    let waste = |t: usize| ((t * unit).next_multiple_of(panel) as f64 / (t * unit) as f64 * 1024.0) as usize;
    let near = |t: usize| (t * unit).abs_diff(256);
    let best = (1..=most).min_by_key(|&t| (waste(t), near(t))).unwrap_or(1);
    (best * unit).min(n)
}

impl PackedMatrix {
    /// Packs `w` [n, k], rounded to `dtype`, in tiles of `tile_columns` outputs for the GEMM of `kernels`.
    ///
    /// # Errors
    /// `OutOfMemory`; `InvalidInput` when `w` is not a contiguous matrix or is empty.
    pub fn new(w: &TensorRef<'_>, dtype: DType, tile_columns: usize, kernels: &Kernels, threads: &Threads) -> Result<Self> {
        let [n, k] = matrix_shape(w)?;
        let (panel, pairs) = (kernels.panel(), kernels.multiplies_pairs(dtype));
        let depth = if pairs { k.next_multiple_of(DOT_STEPS) } else { k };
        let (tiles, padded) = (n.div_ceil(tile_columns), tile_columns.next_multiple_of(panel));
        let bytes = tiled_bytes([n, k], depth, tile_columns, panel, dtype.size())?;
        let start = SendPtr(bytes.as_ptr());
        let source = w.storage();
        threads.run(tiles, &|_, tile| {
            let columns = tile_columns.min(n - tile * tile_columns);
            // SAFETY: tiles lie behind one another, so items write disjoint elements, all within `elements`.
            with_elem!(dtype, T => unsafe {
                let out = start.get().cast::<T>().add(tile * padded * depth);
                let steps = if pairs { 2 } else { 1 };
                let shape = TileShape { k, depth, row0: tile * tile_columns, columns, panel, steps };
                match source {
                    Storage::BF16(s) => pack_tile(s, &shape, out),
                    Storage::F16(s) => pack_tile(s, &shape, out),
                    Storage::F32(s) => pack_tile(s, &shape, out),
                    _ => unreachable!("host storage"),
                }
            });
        });
        Ok(PackedMatrix { bytes, dtype, n, k, tile_columns, panel, pairs, int8: None, scales: Vec::new() })
    }

    /// Quantises `w` [n, k] to int8 and packs it in tiles of `tile_columns` outputs for the GEMM in int8 of `kernels`.
    ///
    /// # Errors
    /// As [`PackedMatrix::new`]; `InvalidInput` when there are more than [`lawson_core::int8::MOST_INPUTS`] inputs.
    pub fn int8(w: &TensorRef<'_>, tile_columns: usize, kernels: &Kernels, threads: &Threads) -> Result<Self> {
        let [n, k] = matrix_shape(w)?;
        check_inputs(k)?;
        let (panel, steps, depth) = (kernels.panel(), kernels.int8_steps, k.next_multiple_of(INT8_BLOCK));
        let padded = tile_columns.next_multiple_of(panel);
        let bytes = tiled_bytes([n, k], depth, tile_columns, panel, 1)?;
        let mut scales = vec![0f32; n];
        let (start, scales_start) = (SendPtr(bytes.as_ptr()), SendPtr(scales.as_mut_ptr()));
        let (source, shift) = (w.storage(), kernels.int8_shift as u8);
        threads.run(n.div_ceil(panel), &|_, part| {
            let (mut row, mut codes) = (vec![0f32; k], vec![0i8; k]);
            for i in part * panel..n.min((part + 1) * panel) {
                row.iter_mut().enumerate().for_each(|(j, x)| *x = source.get(i * k + j));
                let scale = quantise(&row, &mut codes);
                let (tile, column) = (i / tile_columns, i % tile_columns);
                let at = tile * padded * depth + column / panel * panel * depth + column % panel * steps;
                // SAFETY: each output has a scale and bytes of its own in its panel, which holds panel · depth of them.
                unsafe {
                    scales_start.get().add(i).write(scale);
                    let to = start.get().add(at);
                    for (j, &code) in codes.iter().enumerate() {
                        to.add(j / steps * panel * steps + j % steps).write((code as u8).wrapping_add(shift));
                    }
                }
            }
        });
        Ok(PackedMatrix { bytes, dtype: DType::F32, n, k, tile_columns, panel, pairs: false, int8: Some(steps), scales })
    }

    /// Whether the GEMM of `kernels` reads this layout.
    pub fn fits(&self, kernels: &Kernels) -> bool {
        let pairs = self.int8.is_none() && kernels.multiplies_pairs(self.dtype);
        self.panel == kernels.panel() && self.pairs == pairs && self.int8.is_none_or(|steps| steps == kernels.int8_steps)
    }

    /// What kernels read.
    pub fn weights(&self) -> Weights {
        Weights {
            start: self.bytes.as_ptr(),
            dtype: self.dtype,
            n: self.n,
            k: self.k,
            tile_columns: self.tile_columns,
            pairs: self.pairs,
            scales: if self.int8.is_some() { self.scales.as_ptr() } else { std::ptr::null() },
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + size_of_val(self.scales.as_slice())
    }

    /// Where they lie.
    pub fn memory(&self) -> Memory<'_> {
        Memory::from(&self.bytes)
    }
}

/// [n, k] of a contiguous matrix with elements.
fn matrix_shape(w: &TensorRef<'_>) -> Result<[usize; 2]> {
    match (w.shape(), w.is_contiguous()) {
        (&[n, k], true) if n == 0 || k == 0 => {
            Err(Error::invalid(format!("a weight needs at least one row and one column, got {n} x {k}")))
        }
        (&[n, k], true) => Ok([n, k]),
        (shape, _) => Err(Error::invalid(format!("a weight must be a contiguous matrix, got shape {shape:?}"))),
    }
}

/// Zeroed bytes for a matrix [n, k] in tiles of `tile_columns` outputs, each padded to whole panels, with `depth` steps of `size` bytes.
fn tiled_bytes([n, k]: [usize; 2], depth: usize, tile_columns: usize, panel: usize, size: usize) -> Result<AlignedBytes> {
    let tiles = n.div_ceil(tile_columns);
    let elements = (tiles - 1) * tile_columns.next_multiple_of(panel) + (n - (tiles - 1) * tile_columns).next_multiple_of(panel);
    let bytes = elements.checked_mul(depth).and_then(|e| e.checked_mul(size));
    AlignedBytes::new(
        bytes.ok_or_else(|| Error::new(ErrorKind::OutOfMemory, format!("a weight of {n} x {k} elements is too large")))?,
    )
}

/// A column tile of a matrix.
struct TileShape {
    /// Steps, and steps with padding.
    k: usize,
    depth: usize,
    /// First output, and outputs.
    row0: usize,
    columns: usize,
    /// Outputs of a panel, and steps that stand side by side for each.
    panel: usize,
    steps: usize,
}

/// # Safety
/// `out` is writable as the padded tile.
unsafe fn pack_tile<F: Elem, T: Elem>(w: &[F], t: &TileShape, out: *mut T) {
    /// Steps packed together, so that the rows' cache lines are used whole.
    const BLOCK: usize = 32;
    for column0 in (0..t.columns.next_multiple_of(t.panel)).step_by(t.panel) {
        for k0 in (0..t.depth).step_by(BLOCK) {
            for j in 0..t.panel {
                let row = if column0 + j < t.columns { &w[(t.row0 + column0 + j) * t.k..][..t.k] } else { &[] };
                for i in k0..t.depth.min(k0 + BLOCK) {
                    // SAFETY: a reference to an element.
                    let v = T::from_f32(row.get(i).map_or(0.0, |v| unsafe { F::get(v, 0) }));
                    let at = i / t.steps * t.panel * t.steps + j * t.steps + i % t.steps;
                    // SAFETY: the panel starts at column0 · depth and holds panel · depth elements.
                    unsafe { out.add(column0 * t.depth + at).write(v) };
                }
            }
        }
    }
}

/// A pointer that work items share; each proves for itself that it writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct SendPtr<T>(pub *mut T);

// SAFETY: only an address; every use states why it is disjoint.
unsafe impl<T> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

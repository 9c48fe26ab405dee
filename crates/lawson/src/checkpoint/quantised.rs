//! Checkpoints whose attention projections are in int8, as [`Checkpoint::quantise`] writes them.
//!
//! Such a folder is that of the original with `X.weight` of q, k, v and o in every layer as I8 codes [n, k] and `X.weight_scale` as F32 scales `[n]`,
//! as `lawson_core::int8` defines them, beside a `lawson.json`:
//!
//! ```json
//! {"format": "lawson-weights", "version": 1, "weights": "int8", "dtypes": ["bf16", …]}
//! ```
//!
//! `dtypes` has the dtype that each layer's projections were stored in. Codes and scales are those that a block of the original with
//! [`WeightKind::Int8`](crate::WeightKind) computes with, so that both give the same bits.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use lawson_core::{DType, Error, ErrorKind, Result, int8};
use serde_json::json;
use zerocopy::IntoBytes;

use super::Checkpoint;
use crate::{
    json::{Fields, Json},
    tensor_file::{LoadedTensor, StoredDType, TensorFile, reserve, write_atomically, write_safetensors},
};

/// The file that makes a folder a quantised checkpoint.
const FILE: &str = "lawson.json";
const FORMAT: &str = "lawson-weights";
/// The newest version of the format.
const VERSION: usize = 1;
const INDEX: &str = "model.safetensors.index.json";
const PROJECTIONS: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

/// What `lawson.json` says.
#[derive(Clone, Debug)]
pub(super) struct Description {
    /// The dtype that each layer's projections were stored in.
    pub dtypes: Vec<DType>,
}

impl Description {
    /// Reads `dir`'s description; none where it is an ordinary checkpoint.
    pub(super) fn read(dir: &Path, layers: usize) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let at = |e: Error| e.at(path.display());
        match fs::read(&path) {
            Ok(text) => Self::parse(&text, layers).map(Some).map_err(at),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(at(Error::invalid(format!("cannot be read: {e}")))),
        }
    }

    fn parse(text: &[u8], layers: usize) -> Result<Self> {
        let mut f = Fields::new(Json::parse(text)?, "")?;
        let format = f.string("format")?;
        let format = f.required("format", format)?;
        if format != FORMAT {
            return Err(Error::invalid(format!("format {format:?} is not known; accepted: {FORMAT:?}")));
        }
        let version = f.int("version")?;
        match f.required("version", version)? {
            VERSION => {}
            0 => return Err(Error::invalid(format!("version must be {VERSION}, got 0"))),
            newer => {
                let text = format!("version {newer} is newer than what this program reads; accepted: {VERSION}");
                return Err(Error::invalid(text));
            }
        }
        let weights = f.string("weights")?;
        let weights = f.required("weights", weights)?;
        if weights != "int8" {
            return Err(Error::invalid(format!("weights {weights:?} are not known; accepted: \"int8\"")));
        }
        let dtypes = f.strings("dtypes")?;
        let dtypes = f.required("dtypes", dtypes)?;
        f.finish()?;
        if dtypes.len() != layers {
            return Err(Error::invalid(format!("dtypes must name all {layers} layers, got {}", dtypes.len())));
        }
        let dtypes = dtypes.iter().map(|d| d.parse()).collect::<Result<_>>().map_err(|e| e.at("dtypes"))?;
        Ok(Description { dtypes })
    }
}

/// The matrix `name` [n, k] of `file` in f32: each code times its output's scale, which is exact, and quantised again gives the same codes.
pub(super) fn dequantised<'a>(
    file: &TensorFile,
    scales: Option<&TensorFile>,
    name: &str,
    shape: [usize; 2],
) -> Result<LoadedTensor<'a>> {
    let [n, k] = shape;
    let bad = |what: String| Error::invalid(format!("the tensor '{name}' {what}"));
    let (dtype, found, codes) = file.raw(name)?;
    if dtype != StoredDType::I8 {
        return Err(bad(format!("must be I8 in a quantised checkpoint, got {dtype}")));
    }
    if found != shape {
        return Err(bad(format!("has the shape {found:?}, but {shape:?} is needed")));
    }
    let scale_name = format!("{name}_scale");
    let missing = || Error::invalid(format!("the tensor '{scale_name}' [{n}], the scales of '{name}', is missing"));
    let loaded = scales.filter(|f| f.contains(&scale_name)).ok_or_else(missing)?.tensor(&scale_name)?;
    if loaded.dtype() != DType::F32 || loaded.shape() != [n] {
        let (dtype, shape) = (loaded.dtype(), loaded.shape());
        return Err(Error::invalid(format!("the tensor '{scale_name}' is {dtype} {shape:?}, but f32 [{n}] is needed")));
    }
    let scales = loaded.as_ref().to_f32();
    let mut values = reserve(n * k)?;
    let mut again = vec![0i8; k];
    for (i, (codes, &scale)) in codes.chunks_exact(k).zip(&scales).enumerate() {
        values.extend(codes.iter().map(|&c| int8::element(c as i8, scale)));
        let s = int8::quantise(&values[i * k..], &mut again);
        if s.to_bits() != scale.to_bits() && !(s.is_nan() && scale.is_nan()) || again.as_bytes() != codes {
            return Err(bad(format!(
                "has codes or a scale ({scale}) in row {i} that quantising a row does not give: codes reach 127 and no further, and \
                 scales have 16 significant bits"
            )));
        }
    }
    LoadedTensor::owned(values, &shape)
}

/// What [`Checkpoint::quantise`] has written.
#[derive(Clone, Copy, Debug)]
pub struct QuantisedCheckpoint {
    /// Matrices that became int8.
    pub matrices: usize,
    /// Their bytes before.
    pub bytes_before: usize,
    /// Bytes of their codes and scales.
    pub bytes_after: usize,
}

impl Checkpoint {
    /// Writes this checkpoint to the folder `out` with the attention projections of all layers in int8, one scale for each output; other tensors and
    /// the files beside them (JSON, text, tokenizer models) are copied. Opened again it gives the codes that
    /// [`WeightKind::Int8`](crate::WeightKind) computes of this one. `out` is made whole or not at all.
    ///
    /// # Errors
    /// `InvalidInput`, naming folder, file or tensor, when `out` exists and is not an empty folder, when a tensor is missing or does not fit the
    /// configuration, or when this checkpoint is quantised already; `OutOfMemory`; `Device` when a disk fails. Nothing is at `out` then.
    pub fn quantise(&self, out: impl AsRef<Path>) -> Result<QuantisedCheckpoint> {
        let out = out.as_ref();
        if self.description.is_some() {
            return Err(Error::invalid(format!("{}: its weights are in int8 already", self.name)));
        }
        let refused = |why: &dyn std::fmt::Display| {
            Error::invalid(format!(
                "{}: cannot be written: {why}; accepted: a folder that is empty or does not exist yet",
                out.display()
            ))
        };
        let Some(name) = out.file_name() else { return Err(refused(&"it names no folder")) };
        match fs::read_dir(out).map(|mut entries| entries.next().is_some()) {
            Ok(true) => return Err(refused(&"the folder is not empty")),
            Ok(false) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(refused(&e)),
        }
        // Every tensor is looked at before the first is written.
        let dtypes = (0..self.layers()).map(|layer| Ok(self.weights(layer, true)?.as_ref().q_weight.dtype()));
        let dtypes = dtypes.collect::<Result<Vec<DType>>>()?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = out.with_file_name(hidden);
        fs::create_dir(&temporary).map_err(|e| refused(&e))?;
        let written = self.write_quantised(&temporary, &dtypes);
        let done = written.and_then(|report| fs::rename(&temporary, out).map(|()| report).map_err(|e| refused(&e)));
        if done.is_err() {
            // Nothing better can be done when even this fails; the first error is the one to report.
            let _ = fs::remove_dir_all(&temporary);
        }
        done
    }

    /// Whether a tensor is one of the projections.
    fn is_projection(&self, name: &str) -> bool {
        let rest = name.strip_prefix(self.prefix).and_then(|n| n.strip_prefix("layers."));
        let Some((layer, rest)) = rest.and_then(|n| n.split_once('.')) else { return false };
        layer.parse().is_ok_and(|l: usize| l < self.layers())
            && PROJECTIONS.iter().any(|p| rest.strip_prefix("self_attn.").and_then(|r| r.strip_suffix(".weight")) == Some(p))
    }

    fn write_quantised(&self, to: &Path, dtypes: &[DType]) -> Result<QuantisedCheckpoint> {
        let mut report = QuantisedCheckpoint { matrices: 0, bytes_before: 0, bytes_after: 0 };
        let (mut weight_map, mut total) = (serde_json::Map::new(), 0);
        for (number, file) in self.files.iter().enumerate() {
            let file_name = PathBuf::from(file.name()).file_name().map(OsStr::to_owned).unwrap_or_default();
            let names: Vec<&str> = file.names().filter(|n| self.places.get(*n) == Some(&number)).collect();
            let mut made: Vec<(String, [Vec<u8>; 2], [usize; 2])> = Vec::new();
            for name in names.iter().filter(|n| self.is_projection(n)) {
                let tensor = file.tensor(name)?;
                let &[n, k] = tensor.shape() else { continue };
                let (view, mut row) = (tensor.as_ref(), vec![0f32; k]);
                let (mut codes, mut scales) = (reserve::<i8>(n * k)?, reserve::<f32>(n)?);
                codes.resize(n * k, 0);
                for (i, codes) in codes.chunks_exact_mut(k).enumerate() {
                    row.iter_mut().enumerate().for_each(|(j, x)| *x = view.storage().get(i * k + j));
                    scales.push(int8::quantise(&row, codes));
                }
                report.matrices += 1;
                report.bytes_before += n * k * tensor.dtype().size();
                report.bytes_after += n * k + 4 * n;
                let scales = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
                made.push(((*name).to_owned(), [codes.as_bytes().to_vec(), scales], [n, k]));
            }
            let scale_names: Vec<String> = made.iter().map(|(name, ..)| format!("{name}_scale")).collect();
            let mut tensors: Vec<(&str, StoredDType, &[usize], &[u8])> = Vec::new();
            for name in &names {
                match made.iter().position(|(made, ..)| made == name) {
                    None => {
                        let (dtype, shape, bytes) = file.raw(name)?;
                        tensors.push((name, dtype, shape, bytes));
                    }
                    Some(i) => {
                        let (_, [codes, scales], shape) = &made[i];
                        tensors.push((name, StoredDType::I8, shape, codes));
                        tensors.push((&scale_names[i], StoredDType::F32, &shape[..1], scales));
                    }
                }
            }
            for (name, .., bytes) in &tensors {
                total += bytes.len();
                weight_map.insert((*name).to_owned(), json!(file_name.to_string_lossy()));
            }
            write_safetensors(to.join(&file_name), &tensors)?;
        }
        let write = |name: &str, value: serde_json::Value| {
            use io::Write;
            write_atomically(&to.join(name), |file| writeln!(file, "{value:#}"))
        };
        if self.dir.join(INDEX).exists() {
            write(INDEX, json!({"metadata": {"total_size": total}, "weight_map": weight_map}))?;
        }
        let device =
            |path: &Path, e: io::Error| Error::new(ErrorKind::Device, format!("{}: cannot be copied: {e}", path.display()));
        for entry in fs::read_dir(&self.dir).map_err(|e| device(&self.dir, e))? {
            let path = entry.map_err(|e| device(&self.dir, e))?.path();
            let copied = ["json", "txt", "model", "jinja"].into_iter().any(|e| path.extension() == Some(OsStr::new(e)));
            if let Some(name) = path.file_name().filter(|name| copied && path.is_file() && *name != OsStr::new(INDEX)) {
                fs::copy(&path, to.join(name)).map_err(|e| device(&path, e))?;
            }
        }
        let dtypes: Vec<&str> = dtypes.iter().map(|d| d.name()).collect();
        write(FILE, json!({"format": FORMAT, "version": VERSION, "weights": "int8", "dtypes": dtypes}))?;
        Ok(report)
    }
}

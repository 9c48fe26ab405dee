//! Tensors in files: the [safetensors](https://github.com/huggingface/safetensors) format, read from a memory map.
//!
//! The header is checked here rather than by the `safetensors` crate, so that an error names the tensor it is about and no sum of
//! declared sizes can overflow.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    io::Write,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use half::{bf16, f16};
use lawson_core::{DType, Error, ErrorKind, Result, Storage, TensorRef};
pub use safetensors::Dtype as StoredDType;
use serde::{Deserialize, de::IntoDeserializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::json::{Fields, Json};

/// Longest header that is read, as in the `safetensors` crate.
const MAX_HEADER: u64 = 100_000_000;

/// A safetensors file, its header checked and its data not yet read. Errors about one tensor name it, not the file.
#[derive(Debug)]
pub struct TensorFile {
    name: String,
    bytes: Bytes,
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Where a tensor lies in its file; the range is within the file and fits dtype and shape.
#[derive(Clone, Debug)]
struct Stored {
    dtype: StoredDType,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A floating-point tensor of a file: borrowed from it, or copied when its offset there is not aligned.
#[derive(Clone, Debug)]
pub struct LoadedTensor<'a> {
    data: Elements<'a>,
    shape: Vec<usize>,
}

#[derive(Clone, Debug)]
enum Elements<'a> {
    F32(Cow<'a, [f32]>),
    BF16(Cow<'a, [bf16]>),
    F16(Cow<'a, [f16]>),
}

impl LoadedTensor<'_> {
    /// `values` of `shape`, as if a file had held them.
    pub(crate) fn owned(values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        TensorRef::new(&values, shape)?;
        Ok(LoadedTensor { data: Elements::F32(Cow::Owned(values)), shape: shape.to_vec() })
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.storage().dtype()
    }
    /// Length of every dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// The tensor as a view.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef::new(self.storage(), &self.shape).expect("rank and size were checked when the tensor was loaded")
    }
    /// Whether the elements are those of the file, not a copy.
    pub fn is_borrowed(&self) -> bool {
        match &self.data {
            Elements::F32(v) => matches!(v, Cow::Borrowed(_)),
            Elements::BF16(v) => matches!(v, Cow::Borrowed(_)),
            Elements::F16(v) => matches!(v, Cow::Borrowed(_)),
        }
    }
    fn storage(&self) -> Storage<'_> {
        match &self.data {
            Elements::F32(v) => Storage::from(v.as_ref()),
            Elements::BF16(v) => Storage::from(v.as_ref()),
            Elements::F16(v) => Storage::from(v.as_ref()),
        }
    }
}

impl TensorFile {
    /// Maps the file at `path` and checks its header. The file must not be changed by anybody while it is open.
    ///
    /// # Errors
    /// `InvalidInput`, naming the file, when it cannot be read or is not a well-formed safetensors file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let unreadable = |e: std::io::Error| Error::invalid(format!("{name}: cannot be read: {e}"));
        // Asked before the file is opened, since opening a pipe waits for its writer.
        if !path.metadata().map_err(unreadable)?.is_file() {
            return Err(Error::invalid(format!("{name}: not a regular file")));
        }
        let file = File::open(path).map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        // An empty file cannot be mapped.
        let bytes = if length == 0 {
            Bytes::Owned(Vec::new())
        } else {
            // SAFETY: the map is read-only and private to this value. That nobody changes the file meanwhile is the documented
            // duty of the caller, as with every reader of memory-mapped checkpoints.
            Bytes::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?)
        };
        Self::check(name, bytes)
    }

    /// A file that is already in memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// `InvalidInput`, naming the file, when it is not a well-formed safetensors file.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::check(name.to_owned(), Bytes::Owned(bytes))
    }

    fn check(name: String, bytes: Bytes) -> Result<Self> {
        let tensors = parse_header(bytes.as_slice()).map_err(|e| e.at(&name))?;
        Ok(TensorFile { name, bytes, tensors })
    }

    /// What messages call this file.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
    /// Element type of the tensor `name` in the file.
    pub fn stored_dtype(&self, name: &str) -> Option<StoredDType> {
        self.tensors.get(name).map(|t| t.dtype)
    }
    /// Shape of the tensor `name`.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        self.stored(name).map(|t| t.shape.as_slice())
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| Error::invalid(format!("the tensor '{name}' is missing")))
    }

    fn data(&self, tensor: &Stored) -> &[u8] {
        &self.bytes.as_slice()[tensor.range.clone()]
    }

    /// Element type, shape and bytes of the tensor `name`, whatever it holds.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such tensor.
    pub fn raw(&self, name: &str) -> Result<(StoredDType, &[usize], &[u8])> {
        let t = self.stored(name)?;
        Ok((t.dtype, &t.shape, self.data(t)))
    }

    /// The tensor `name`, which must be f32, bf16 or f16 and have at most four dimensions.
    ///
    /// # Errors
    /// `InvalidInput` when it is missing or has another dtype; `OutOfMemory` when a misaligned tensor cannot be copied.
    pub fn tensor(&self, name: &str) -> Result<LoadedTensor<'_>> {
        let t = self.stored(name)?;
        let bytes = self.data(t);
        let data = match t.dtype {
            StoredDType::F32 => Elements::F32(elements(bytes, |b| f32::from_le_bytes(*b))?),
            StoredDType::BF16 => Elements::BF16(elements(bytes, |b| bf16::from_le_bytes(*b))?),
            StoredDType::F16 => Elements::F16(elements(bytes, |b| f16::from_le_bytes(*b))?),
            other => return Err(Error::invalid(format!("the tensor '{name}' must be F32, BF16 or F16, got {other}"))),
        };
        let loaded = LoadedTensor { data, shape: t.shape.clone() };
        TensorRef::new(loaded.storage(), &loaded.shape).map_err(|e| e.at(format!("the tensor '{name}'")))?;
        Ok(loaded)
    }

    /// The numbers of the tensor `name`, which must be F64, F32, BF16 or F16.
    ///
    /// # Errors
    /// `InvalidInput` when it is missing or has another dtype.
    pub fn doubles(&self, name: &str) -> Result<Vec<f64>> {
        let t = self.stored(name)?;
        if t.dtype == StoredDType::F64 {
            return Ok(elements(self.data(t), |b| f64::from_le_bytes(*b))?.into_owned());
        }
        let tensor = self.tensor(name)?;
        let storage = tensor.storage();
        let mut values = reserve(storage.len())?;
        values.extend((0..storage.len()).map(|i| f64::from(storage.get(i))));
        Ok(values)
    }

    /// The integers of the tensor `name`, which must be I64 or I32.
    ///
    /// # Errors
    /// `InvalidInput` when it is missing or has another dtype.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>> {
        let t = self.stored(name)?;
        match t.dtype {
            StoredDType::I64 => Ok(elements(self.data(t), |b| i64::from_le_bytes(*b))?.into_owned()),
            StoredDType::I32 => {
                let values = elements(self.data(t), |b| i32::from_le_bytes(*b))?;
                Ok(values.iter().map(|&v| v.into()).collect())
            }
            other => Err(Error::invalid(format!("the tensor '{name}' must be I64 or I32, got {other}"))),
        }
    }

    /// The bytes of the tensor `name`, which must be BOOL or U8 and hold only 0 and 1.
    ///
    /// # Errors
    /// `InvalidInput` when it is missing, has another dtype or another value.
    pub fn flags(&self, name: &str) -> Result<&[u8]> {
        let t = self.stored(name)?;
        if !matches!(t.dtype, StoredDType::BOOL | StoredDType::U8) {
            return Err(Error::invalid(format!("the tensor '{name}' must be BOOL or U8, got {}", t.dtype)));
        }
        let bytes = self.data(t);
        match bytes.iter().position(|&b| b > 1) {
            Some(i) => Err(Error::invalid(format!("the tensor '{name}' may hold only 0 and 1, got {} at element {i}", bytes[i]))),
            None => Ok(bytes),
        }
    }
}

/// `bytes` as elements of the file's byte order, borrowed when they are aligned; `bytes` holds a whole number of them.
fn elements<'a, T, const N: usize>(bytes: &'a [u8], from_le: fn(&[u8; N]) -> T) -> Result<Cow<'a, [T]>>
where
    T: Clone + FromBytes + Immutable,
{
    if cfg!(target_endian = "little")
        && let Ok(aligned) = <[T]>::ref_from_bytes(bytes)
    {
        return Ok(Cow::Borrowed(aligned));
    }
    let (whole, _) = bytes.as_chunks::<N>();
    let mut copy = reserve(whole.len())?;
    copy.extend(whole.iter().map(from_le));
    Ok(Cow::Owned(copy))
}

/// An empty vector with room for `len` elements.
pub(crate) fn reserve<T>(len: usize) -> Result<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(len)
        .map_err(|_| Error::new(ErrorKind::OutOfMemory, format!("no memory for {len} elements of {} bytes", size_of::<T>())))?;
    Ok(v)
}

fn parse_header(file: &[u8]) -> Result<BTreeMap<String, Stored>> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(Error::invalid(format!("not a safetensors file: {} bytes hold no header", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(Error::invalid(format!(
            "not a safetensors file: its header would have {length} bytes, at most {MAX_HEADER}"
        )));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return Err(Error::invalid(format!("truncated: the header needs {length} bytes, but only {} follow", rest.len())));
    };
    if header.first() != Some(&b'{') {
        return Err(Error::invalid("not a safetensors file: its header is not a JSON object"));
    }
    let mut fields = Json::parse(header).and_then(|json| Fields::new(json, "")).map_err(|e| e.at("header"))?;
    if let Some(metadata) = fields.object("__metadata__").map_err(|e| e.at("header"))? {
        metadata.all_strings().map_err(|e| e.at("header"))?;
    }
    let mut tensors = BTreeMap::new();
    for (name, entry) in fields.rest() {
        let tensor = parse_entry(entry, &name).map_err(|e| e.at("header"))?;
        tensors.insert(name, tensor);
    }
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, t)| (t.range.start, t.range.end));
    let mut end = 0;
    for (name, t) in by_offset {
        if t.range.start != end {
            let what = if t.range.start < end { "overlaps another tensor" } else { "leaves a gap" };
            return Err(Error::invalid(format!(
                "the tensor '{name}' starts at byte {} and {what}; {end} is needed",
                t.range.start
            )));
        }
        if t.range.end > data.len() {
            return Err(Error::invalid(format!(
                "truncated: the tensor '{name}' ends at byte {} of the data, which has {}",
                t.range.end,
                data.len()
            )));
        }
        end = t.range.end;
    }
    if end != data.len() {
        return Err(Error::invalid(format!("{} bytes after the last tensor belong to none", data.len() - end)));
    }
    let start = file.len() - data.len();
    for t in tensors.values_mut() {
        t.range = t.range.start + start..t.range.end + start;
    }
    Ok(tensors)
}

/// One entry of the header; its range counts from the start of the data and may still lie outside it.
fn parse_entry(entry: Json, name: &str) -> Result<Stored> {
    let bad = |what: String| Error::invalid(format!("the tensor '{name}' {what}"));
    let mut fields = Fields::new(entry, &format!("'{name}'"))?;
    let dtype = fields.string("dtype")?;
    let dtype = fields.required("dtype", dtype)?;
    let dtype = StoredDType::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(dtype.as_str()))
        .map_err(|_| bad(format!("has the unknown dtype {dtype:?}")))?;
    let shape = fields.ints("shape")?;
    let shape = fields.required("shape", shape)?;
    let offsets = fields.ints("data_offsets")?;
    let offsets = fields.required("data_offsets", offsets)?;
    fields.finish()?;
    let &[start, end] = offsets.as_slice() else {
        return Err(bad(format!("needs two data_offsets, got {}", offsets.len())));
    };
    let bits = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).and_then(|n| n.checked_mul(dtype.bitsize()));
    let needed = bits.ok_or_else(|| bad(format!("has the shape {shape:?}, whose size overflows")))?;
    if end.checked_sub(start).and_then(|n| n.checked_mul(8)) != Some(needed) {
        return Err(bad(format!(
            "of dtype {dtype} and shape {shape:?} needs {needed} bits, but data_offsets are {start} to {end}"
        )));
    }
    Ok(Stored { dtype, shape, range: start..end })
}

/// Writes a safetensors file of `(name, dtype, shape, bytes)`, complete or not at all: an existing file is replaced only once the
/// new one is whole.
///
/// # Errors
/// `InvalidInput`, naming the path, when it cannot be written; or a tensor, when its bytes do not fit dtype and shape.
pub fn write_safetensors(path: impl AsRef<Path>, tensors: &[(&str, StoredDType, &[usize], &[u8])]) -> Result<()> {
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, dtype, shape, bytes) in tensors {
        let bits = shape.iter().try_fold(dtype.bitsize(), |n, &d| n.checked_mul(d));
        if bits.is_none() || bits != bytes.len().checked_mul(8) {
            let what = format!("the tensor '{name}' of dtype {dtype} and shape {shape:?} was given {} bytes", bytes.len());
            return Err(Error::invalid(what));
        }
        let entry =
            serde_json::json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [offset, offset + bytes.len()]});
        if header.insert((*name).to_owned(), entry).is_some() {
            return Err(Error::invalid(format!("the tensor '{name}' was given twice")));
        }
        offset += bytes.len();
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically(path.as_ref(), |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        tensors.iter().try_for_each(|(.., bytes)| file.write_all(bytes))
    })
}

/// Writes `path` through a temporary file in the same folder.
pub(crate) fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let refused = |e: &dyn std::fmt::Display| Error::invalid(format!("{}: cannot be written: {e}", path.display()));
    let Some(file_name) = path.file_name() else {
        return Err(refused(&"it names no file"));
    };
    if path.metadata().is_ok_and(|m| !m.is_file()) {
        return Err(refused(&"it exists and is not a regular file"));
    }
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(file_name);
    temporary.push(format!(".{}-{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let temporary = path.with_file_name(temporary);
    let mut file = File::create_new(&temporary).map_err(|e| refused(&e))?;
    let written =
        write(&mut file).map_err(|e| Error::new(ErrorKind::Device, format!("{}: cannot be written: {e}", path.display())));
    drop(file);
    let done = written.and_then(|()| std::fs::rename(&temporary, path).map_err(|e| refused(&e)));
    if done.is_err() {
        // Nothing better can be done when even this fails; the first error is the one to report.
        let _ = std::fs::remove_file(&temporary);
    }
    done
}

/// `values` rounded to nearest even to `dtype`, as a safetensors file stores them.
pub(crate) fn encode(values: &[f32], dtype: DType) -> Result<Vec<u8>> {
    let mut out = reserve(values.len() * dtype.size())?;
    match dtype {
        DType::F32 if cfg!(target_endian = "little") => out.extend_from_slice(values.as_bytes()),
        DType::BF16 => values.iter().for_each(|&v| out.extend(bf16::from_f32(v).to_le_bytes())),
        DType::F16 => values.iter().for_each(|&v| out.extend(f16::from_f32(v).to_le_bytes())),
        _ => values.iter().for_each(|&v| out.extend(v.to_le_bytes())),
    }
    Ok(out)
}

/// What a file calls `dtype`.
pub(crate) fn stored_dtype(dtype: DType) -> StoredDType {
    match dtype {
        DType::BF16 => StoredDType::BF16,
        DType::F16 => StoredDType::F16,
        _ => StoredDType::F32,
    }
}

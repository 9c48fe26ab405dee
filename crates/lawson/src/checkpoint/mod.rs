//! Attention blocks of Hugging Face checkpoints: `config.json` and one or many safetensors files, memory-mapped.

mod config;
mod quantised;

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use config::Config;
use lawson_core::{DType, Error, Result, TensorRef, WeightKind, problem::BlockSpec};
use quantised::Description;
pub use quantised::QuantisedCheckpoint;

use crate::{
    BlockWeights,
    json::{Fields, Json},
    tensor_file::{LoadedTensor, TensorFile},
};

/// An open checkpoint folder of the Llama, Mistral, Qwen2 or Qwen3 family. Its files must not be changed while it is open.
#[derive(Debug)]
pub struct Checkpoint {
    /// What messages call the folder.
    name: String,
    dir: PathBuf,
    config: Config,
    /// What is said of its weights where they are quantised.
    description: Option<Description>,
    files: Vec<TensorFile>,
    /// The file of each tensor, by its index in `files`.
    places: BTreeMap<String, usize>,
    /// What stands before `layers.0.…` in names of tensors: `model.`, or nothing when a base model was saved.
    prefix: &'static str,
}

/// The weights of one layer's attention block as the checkpoint stores them; [`LayerWeights::as_ref`] views them.
#[derive(Clone, Debug)]
pub struct LayerWeights<'a> {
    q_weight: LoadedTensor<'a>,
    k_weight: LoadedTensor<'a>,
    v_weight: LoadedTensor<'a>,
    o_weight: LoadedTensor<'a>,
    q_bias: Option<LoadedTensor<'a>>,
    k_bias: Option<LoadedTensor<'a>>,
    v_bias: Option<LoadedTensor<'a>>,
    o_bias: Option<LoadedTensor<'a>>,
    input_norm: Option<LoadedTensor<'a>>,
    q_norm: Option<LoadedTensor<'a>>,
    k_norm: Option<LoadedTensor<'a>>,
}

impl LayerWeights<'_> {
    /// The weights as views.
    pub fn as_ref(&self) -> BlockWeights<'_> {
        fn view<'a>(t: &'a Option<LoadedTensor<'_>>) -> Option<TensorRef<'a>> {
            t.as_ref().map(LoadedTensor::as_ref)
        }
        BlockWeights {
            q_bias: view(&self.q_bias),
            k_bias: view(&self.k_bias),
            v_bias: view(&self.v_bias),
            o_bias: view(&self.o_bias),
            input_norm: view(&self.input_norm),
            q_norm: view(&self.q_norm),
            k_norm: view(&self.k_norm),
            ..BlockWeights::new(self.q_weight.as_ref(), self.k_weight.as_ref(), self.v_weight.as_ref(), self.o_weight.as_ref())
        }
    }
}

impl Checkpoint {
    /// Opens the folder `dir`: `config.json`, and `model.safetensors` or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// `InvalidInput`, naming the file, when one is missing or malformed, or when the configuration says something that a block cannot
    /// express.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let read = |path: &Path| std::fs::read(path).map_err(|e| Error::invalid(format!("cannot be read: {e}")));
        let path = dir.join("config.json");
        let config = read(&path).and_then(|text| Config::parse(&text)).map_err(|e| e.at(path.display()))?;

        let description = Description::read(dir, config.layers)?;
        let (single, index) = (dir.join("model.safetensors"), dir.join("model.safetensors.index.json"));
        let (files, places) = if single.exists() || !index.exists() {
            let file = TensorFile::open(&single)?;
            let places = file.names().map(|n| (n.to_owned(), 0)).collect();
            (vec![file], places)
        } else {
            let map = read(&index).and_then(|text| weight_map(&text)).map_err(|e| e.at(index.display()))?;
            open_all(dir, map)?
        };
        let prefix = if places.keys().any(|n: &String| n.starts_with("model.layers.")) { "model." } else { "" };
        let (name, dir) = (dir.display().to_string(), dir.to_owned());
        Ok(Checkpoint { name, dir, config, description, files, places, prefix })
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.config.layers
    }

    /// A floating-point tensor of the model by its name without the `model.` that stands before those of the base model, such as
    /// `layers.0.mlp.gate_proj.weight` or `lm_head.weight`; none where the checkpoint does not have it.
    ///
    /// # Errors
    /// `InvalidInput` when it has another dtype than f32, bf16 or f16.
    pub fn tensor(&self, name: &str) -> Result<Option<LoadedTensor<'_>>> {
        let full = [format!("{}{name}", self.prefix), name.to_owned()];
        let found = full.iter().find_map(|name| Some((name, *self.places.get(name)?)));
        found.map(|(name, place)| self.files[place].tensor(name)).transpose().map_err(|e| e.at(&self.name))
    }

    /// How the projections' weights are held: `Int8` where [`Checkpoint::quantise`] wrote them.
    pub fn weight_kind(&self) -> WeightKind {
        if self.description.is_some() { WeightKind::Int8 } else { WeightKind::Compute }
    }

    /// The dtype that the projections of `layer` were in before they were quantised; none where they are not.
    pub(crate) fn original_dtype(&self, layer: usize) -> Option<DType> {
        self.description.as_ref()?.dtypes.get(layer).copied()
    }

    /// The block of `layer`: the self-attention alone, or `with_norm` with the input norm before it and the residual after it.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such layer.
    pub fn block_spec(&self, layer: usize, with_norm: bool) -> Result<BlockSpec> {
        if layer >= self.layers() {
            let what = format!("{}: layer {layer} is out of range; the checkpoint has {} layers", self.name, self.layers());
            return Err(Error::invalid(what));
        }
        self.config.block_spec(layer, with_norm).map_err(|e| e.at(&self.name))
    }

    /// The weights of [`Checkpoint::block_spec`], in the checkpoint's dtype and, where they are aligned, in its memory map; those in int8 as f32,
    /// which are quantised to the same codes.
    ///
    /// # Errors
    /// `InvalidInput`, naming the tensor, when one is missing, not asked for by the configuration, or has the wrong shape or dtype.
    pub fn weights(&self, layer: usize, with_norm: bool) -> Result<LayerWeights<'_>> {
        let spec = self.block_spec(layer, with_norm)?;
        let reader = Layer { checkpoint: self, prefix: format!("{}layers.{layer}.", self.prefix) };
        reader.weights(&spec).map_err(|e| e.at(&self.name))
    }
}

/// Tensors of one layer.
struct Layer<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
}

impl<'a> Layer<'a> {
    fn weights(&self, spec: &BlockSpec) -> Result<LayerWeights<'a>> {
        let a = &spec.attention;
        let (e, d, q, kv, b) = (spec.hidden_size, a.head_dim, a.q_dim(), a.kv_dim(), &spec.biases);
        let (norm, qk_norm) = (spec.input_norm.is_some(), spec.qk_norm.is_some());
        Ok(LayerWeights {
            q_weight: self.projection("self_attn.q_proj.weight", [q, e])?,
            k_weight: self.projection("self_attn.k_proj.weight", [kv, e])?,
            v_weight: self.projection("self_attn.v_proj.weight", [kv, e])?,
            o_weight: self.projection("self_attn.o_proj.weight", [e, q])?,
            q_bias: self.optional("self_attn.q_proj.bias", q, b.q)?,
            k_bias: self.optional("self_attn.k_proj.bias", kv, b.k)?,
            v_bias: self.optional("self_attn.v_proj.bias", kv, b.v)?,
            o_bias: self.optional("self_attn.o_proj.bias", e, b.o)?,
            q_norm: self.optional("self_attn.q_norm.weight", d, qk_norm)?,
            k_norm: self.optional("self_attn.k_norm.weight", d, qk_norm)?,
            input_norm: norm.then(|| self.tensor("input_layernorm.weight", &[e])).transpose()?,
        })
    }

    /// A projection's weight, out of its codes where it is quantised.
    fn projection(&self, name: &str, needed: [usize; 2]) -> Result<LoadedTensor<'a>> {
        if self.checkpoint.description.is_none() {
            return self.tensor(name, &needed);
        }
        let full = format!("{}{name}", self.prefix);
        let file = |name: &str| self.checkpoint.places.get(name).map(|&place| &self.checkpoint.files[place]);
        let codes = file(&full).ok_or_else(|| Error::invalid(format!("the tensor '{full}' {needed:?} is missing")))?;
        quantised::dequantised(codes, file(&format!("{full}_scale")), &full, needed)
    }

    /// A vector that is there exactly when it is asked for.
    fn optional(&self, name: &str, len: usize, asked: bool) -> Result<Option<LoadedTensor<'a>>> {
        if asked {
            return self.tensor(name, &[len]).map(Some);
        }
        let full = format!("{}{name}", self.prefix);
        match self.checkpoint.places.contains_key(&full) {
            true => Err(Error::invalid(format!("the tensor '{full}' is there, but config.json does not ask for it"))),
            false => Ok(None),
        }
    }

    fn tensor(&self, name: &str, needed: &[usize]) -> Result<LoadedTensor<'a>> {
        let full = format!("{}{name}", self.prefix);
        let Some(&place) = self.checkpoint.places.get(&full) else {
            return Err(Error::invalid(format!("the tensor '{full}' {needed:?} is missing")));
        };
        let tensor = self.checkpoint.files[place].tensor(&full)?;
        if tensor.shape() == needed {
            return Ok(tensor);
        }
        let shape = tensor.shape();
        let norm = if name.contains("_norm") { " (QK-norm must be RMSNorm over D; over H·D it is not supported)" } else { "" };
        Err(Error::invalid(format!("the tensor '{full}' has the shape {shape:?}, but {needed:?} is needed{norm}")))
    }
}

/// The file of each tensor, as an index says it.
fn weight_map(text: &[u8]) -> Result<BTreeMap<String, String>> {
    let mut index = Fields::new(Json::parse(text)?, "")?;
    let map = index.object("weight_map")?;
    let map = index.required("weight_map", map)?;
    map.all_strings()?;
    let place = |(tensor, file)| match file {
        Json::String(file) if is_file_name(&file) => Ok((tensor, file)),
        _ => Err(Error::invalid(format!("weight_map.{tensor} must name a file of the same folder"))),
    };
    map.rest().into_iter().map(place).collect()
}

fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

fn open_all(dir: &Path, map: BTreeMap<String, String>) -> Result<(Vec<TensorFile>, BTreeMap<String, usize>)> {
    let (mut files, mut numbers, mut places) = (Vec::<TensorFile>::new(), BTreeMap::new(), BTreeMap::new());
    for (tensor, file) in map {
        let number = match numbers.get(&file) {
            Some(&number) => number,
            None => {
                files.push(TensorFile::open(dir.join(&file))?);
                numbers.insert(file, files.len() - 1);
                files.len() - 1
            }
        };
        if !files[number].contains(&tensor) {
            let what = format!("{}: the tensor '{tensor}' is missing, though the index places it there", files[number].name());
            return Err(Error::invalid(what));
        }
        places.insert(tensor, number);
    }
    Ok((files, places))
}

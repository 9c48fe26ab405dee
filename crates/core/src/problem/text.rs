//! The one-line form of problems: what a problem prints is what it parses from.

use std::{
    fmt::{self, Display, Write},
    str::FromStr,
};

use super::{
    AttentionProblem, AttentionSpec, Biases, BlockProblem, BlockSpec, Lengths, MaskShape, Real, RopeLayout, RopeScaling,
    RopeSpec, Yarn,
};
use crate::{CacheDType, DType, Error, Result, WeightKind};

/// Most sequences that a line may ask for; bounds what parsing allocates.
const MAX_SEQUENCES: usize = 1 << 20;

/// Base of the frequencies where a line names none.
const DEFAULT_THETA: f64 = 10000.0;

const BLOCK_TOKENS: &str = "b= s= past= e= h= d= causal full window= scale= softcap= sinks alibi mask mask= qk_norm= input_norm= \
     residual bias= rope= f32 bf16 f16 weights= kv= page=";
const ATTENTION_TOKENS: &str = "b= s= past= h= d= causal full window= scale= softcap= sinks alibi mask mask= f32 bf16 f16 kv=";

// Printing

fn write_lengths(f: &mut fmt::Formatter<'_>, name: &str, lengths: &[usize]) -> fmt::Result {
    write!(f, " {name}=")?;
    let shown = if lengths.iter().all(|n| *n == lengths[0]) { &lengths[..lengths.len().min(1)] } else { lengths };
    write_joined(f, shown, ',')
}

fn write_joined(f: &mut fmt::Formatter<'_>, items: &[impl Display], separator: char) -> fmt::Result {
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            f.write_char(separator)?;
        }
        write!(f, "{item}")?;
    }
    Ok(())
}

fn write_batch(f: &mut fmt::Formatter<'_>, batch: &Lengths) -> fmt::Result {
    write!(f, " b={}", batch.sequences())?;
    write_lengths(f, "s", batch.new_tokens())?;
    write_lengths(f, "past", batch.past())
}

fn write_attention(f: &mut fmt::Formatter<'_>, a: &AttentionSpec, mask: Option<MaskShape>) -> fmt::Result {
    write!(f, " h={}/{} d={}", a.heads, a.kv_heads, a.head_dim)?;
    f.write_str(if a.causal { " causal" } else { " full" })?;
    a.window.map_or(Ok(()), |w| write!(f, " window={w}"))?;
    a.scale.map_or(Ok(()), |s| write!(f, " scale={s}"))?;
    a.softcap.map_or(Ok(()), |c| write!(f, " softcap={c}"))?;
    f.write_str(if a.sinks { " sinks" } else { "" })?;
    f.write_str(if a.alibi { " alibi" } else { "" })?;
    f.write_str(match mask {
        None => "",
        Some(MaskShape { per_sequence: false, per_head: false }) => " mask",
        Some(MaskShape { per_sequence: true, per_head: false }) => " mask=b",
        Some(MaskShape { per_sequence: false, per_head: true }) => " mask=h",
        Some(MaskShape { per_sequence: true, per_head: true }) => " mask=bh",
    })
}

fn write_dtypes(f: &mut fmt::Formatter<'_>, dtype: DType, kv: CacheDType) -> fmt::Result {
    write!(f, " {dtype}")?;
    if kv == dtype { Ok(()) } else { write!(f, " kv={kv}") }
}

impl Display for BlockProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spec = &self.spec;
        f.write_str("block")?;
        write_batch(f, &self.batch)?;
        write!(f, " e={}", spec.hidden_size)?;
        write_attention(f, &spec.attention, self.mask)?;
        spec.qk_norm.map_or(Ok(()), |e| write!(f, " qk_norm={e}"))?;
        spec.input_norm.map_or(Ok(()), |e| write!(f, " input_norm={e}"))?;
        f.write_str(if spec.residual { " residual" } else { "" })?;
        if spec.biases != Biases::default() {
            f.write_str(" bias=")?;
            let Biases { q, k, v, o } = spec.biases;
            for (letter, on) in [('q', q), ('k', k), ('v', v), ('o', o)] {
                if on {
                    f.write_char(letter)?;
                }
            }
        }
        spec.rope.as_ref().map_or(Ok(()), |r| write!(f, " rope={r}"))?;
        write_dtypes(f, self.dtype, self.kv_dtype)?;
        if self.weights != WeightKind::Compute {
            write!(f, " weights={}", self.weights)?;
        }
        self.page_size.map_or(Ok(()), |rows| write!(f, " page={rows}"))
    }
}

impl Display for AttentionProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("attention")?;
        write_batch(f, &self.batch)?;
        write_attention(f, &self.spec, self.mask)?;
        write_dtypes(f, self.dtype, self.kv_dtype)
    }
}

/// Prints as `LAYOUT[,theta=θ][,dim=ROTARY_DIM][,SCALING:parameters]`, for example `half,theta=500000,llama3:8:1:4:8192`.
impl Display for RopeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.layout {
            RopeLayout::Half => "half",
            RopeLayout::Interleaved => "interleaved",
        })?;
        if self.theta.get() != DEFAULT_THETA {
            write!(f, ",theta={}", self.theta)?;
        }
        self.rotary_dim.map_or(Ok(()), |d| write!(f, ",dim={d}"))?;
        let option = |f: &mut fmt::Formatter<'_>, name: &str, v: Option<Real>| match v {
            Some(v) => write!(f, ":{name}={v}"),
            None => Ok(()),
        };
        match &self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => write!(f, ",linear:{factor}"),
            RopeScaling::Dynamic { factor, original } => write!(f, ",dynamic:{factor}:{original}"),
            RopeScaling::Llama3 { factor, low, high, original } => write!(f, ",llama3:{factor}:{low}:{high}:{original}"),
            RopeScaling::Yarn(y) => {
                write!(f, ",yarn:{}:{}", y.factor, y.original)?;
                option(f, "beta_fast", y.beta_fast)?;
                option(f, "beta_slow", y.beta_slow)?;
                f.write_str(if y.truncate { "" } else { ":truncate=false" })?;
                option(f, "attention_factor", y.attention_factor)?;
                option(f, "mscale", y.mscale)?;
                option(f, "mscale_all_dim", y.mscale_all_dim)
            }
            RopeScaling::LongRope { short, long, original, factor, attention_factor } => {
                f.write_str(",longrope:")?;
                write_joined(f, short, '/')?;
                f.write_char(':')?;
                write_joined(f, long, '/')?;
                write!(f, ":{original}")?;
                option(f, "factor", *factor)?;
                option(f, "attention_factor", *attention_factor)
            }
        }
    }
}

// Parsing

/// `text` in quotes, cut short so that an error stays one line.
fn quote(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("'{}…'", &text[..end]),
        None => format!("'{text}'"),
    }
}

fn malformed(token: &str, accepted: &str) -> Error {
    Error::invalid(format!("malformed token {}; accepted: {accepted}", quote(token)))
}

fn integer(token: &str, text: &str) -> Result<usize> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits {
        return Err(malformed(token, &format!("whole numbers, 0 or greater, where it has {}", quote(text))));
    }
    text.parse().map_err(|_| Error::invalid(format!("the number in token {} is too large", quote(token))))
}

fn real(token: &str, text: &str) -> Result<Real> {
    let value = text.parse().ok().and_then(Real::new);
    value.ok_or_else(|| malformed(token, &format!("a finite number where it has {}", quote(text))))
}

fn integers(token: &str, text: &str) -> Result<Vec<usize>> {
    let list = text.split(',').take(MAX_SEQUENCES + 1).map(|n| integer(token, n)).collect::<Result<Vec<_>>>()?;
    if list.len() > MAX_SEQUENCES {
        return Err(malformed(token, &format!("at most {MAX_SEQUENCES} sequences")));
    }
    Ok(list)
}

fn reals(token: &str, text: &str) -> Result<Vec<Real>> {
    text.split('/').map(|n| real(token, n)).collect()
}

fn set<T>(slot: &mut Option<T>, token: &str, value: T) -> Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::invalid(format!("token {} repeats an earlier one; each is accepted once", quote(token)))),
    }
}

/// As [`set`], where `choices` exclude one another.
fn choose<T>(slot: &mut Option<T>, token: &str, value: T, choices: &str) -> Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::invalid(format!("token {} is a second choice; accepted: one of {choices}", quote(token)))),
    }
}

/// The tokens of a line, each at most once.
#[derive(Default)]
struct Fields {
    b: Option<usize>,
    s: Option<Vec<usize>>,
    past: Option<Vec<usize>>,
    e: Option<usize>,
    heads: Option<(usize, usize)>,
    d: Option<usize>,
    causal: Option<bool>,
    window: Option<usize>,
    scale: Option<Real>,
    softcap: Option<Real>,
    sinks: Option<bool>,
    alibi: Option<bool>,
    mask: Option<MaskShape>,
    qk_norm: Option<Real>,
    input_norm: Option<Real>,
    residual: Option<bool>,
    biases: Option<Biases>,
    rope: Option<RopeSpec>,
    dtype: Option<DType>,
    weights: Option<WeightKind>,
    kv: Option<CacheDType>,
    page: Option<usize>,
}

impl Fields {
    /// Reads a line that starts with `kind`; `accepted` lists the tokens of that kind.
    fn parse(line: &str, kind: &str, accepted: &str) -> Result<Self> {
        let mut tokens = line.split_whitespace();
        match tokens.next() {
            Some(word) if word == kind => {}
            word => {
                let found = word.map_or("nothing".into(), quote);
                return Err(Error::invalid(format!("the line of a {kind} problem starts with the word '{kind}', found {found}")));
            }
        }
        let mut fields = Fields::default();
        for token in tokens {
            let name = token.split_inclusive('=').next().unwrap_or(token);
            if !accepted.split_whitespace().any(|a| a == name) {
                return Err(Error::invalid(format!("unknown token {}; accepted after '{kind}': {accepted}", quote(token))));
            }
            fields.read(token, name, &token[name.len()..])?;
        }
        Ok(fields)
    }

    fn read(&mut self, token: &str, name: &str, value: &str) -> Result<()> {
        match name {
            "b=" => set(&mut self.b, token, integer(token, value)?),
            "s=" => set(&mut self.s, token, integers(token, value)?),
            "past=" => set(&mut self.past, token, integers(token, value)?),
            "e=" => set(&mut self.e, token, integer(token, value)?),
            "h=" => {
                let (heads, kv_heads) = value.split_once('/').unwrap_or((value, value));
                set(&mut self.heads, token, (integer(token, heads)?, integer(token, kv_heads)?))
            }
            "d=" => set(&mut self.d, token, integer(token, value)?),
            "causal" | "full" => choose(&mut self.causal, token, name == "causal", "causal, full"),
            "window=" => set(&mut self.window, token, integer(token, value)?),
            "scale=" => set(&mut self.scale, token, real(token, value)?),
            "softcap=" => set(&mut self.softcap, token, real(token, value)?),
            "sinks" => set(&mut self.sinks, token, true),
            "alibi" => set(&mut self.alibi, token, true),
            "mask" => set(&mut self.mask, token, MaskShape { per_sequence: false, per_head: false }),
            "mask=" => {
                let (per_sequence, per_head) = match value {
                    "b" => (true, false),
                    "h" => (false, true),
                    "bh" => (true, true),
                    _ => return Err(malformed(token, "mask, mask=b, mask=h, mask=bh")),
                };
                set(&mut self.mask, token, MaskShape { per_sequence, per_head })
            }
            "qk_norm=" => set(&mut self.qk_norm, token, real(token, value)?),
            "input_norm=" => set(&mut self.input_norm, token, real(token, value)?),
            "residual" => set(&mut self.residual, token, true),
            "bias=" => set(&mut self.biases, token, biases(token, value)?),
            "rope=" => set(&mut self.rope, token, value.parse().map_err(|e: Error| e.at("rope"))?),
            "weights=" => set(&mut self.weights, token, value.parse().map_err(|e: Error| e.at(quote(token)))?),
            "kv=" => set(&mut self.kv, token, value.parse().map_err(|e: Error| e.at(quote(token)))?),
            "page=" => set(&mut self.page, token, integer(token, value)?),
            _ => choose(&mut self.dtype, token, name.parse()?, "f32, bf16, f16"),
        }
    }

    fn batch(&self) -> Result<Lengths> {
        let s = self.s.clone().ok_or_else(|| missing("s=", "new tokens of each sequence"))?;
        let past = self.past.clone().unwrap_or_else(|| vec![0]);
        let listed = s.len().max(past.len());
        let sequences = match self.b {
            Some(b) => b,
            None if listed > 1 => listed,
            None => return Err(missing("b=", "number of sequences, unless s= or past= lists one number for each")),
        };
        if sequences == 0 || sequences > MAX_SEQUENCES {
            return Err(Error::invalid(format!("b must be between 1 and {MAX_SEQUENCES}, got {sequences}")));
        }
        let spread = |name: &str, list: Vec<usize>| match list.len() {
            1 => Ok(vec![list[0]; sequences]),
            n if n == sequences => Ok(list),
            n => Err(Error::invalid(format!(
                "{name}= lists {n} numbers, but b is {sequences}; accepted: one, or one for each sequence"
            ))),
        };
        Lengths::ragged(spread("s", s)?, spread("past", past)?)
    }

    fn attention(&self) -> Result<AttentionSpec> {
        let (heads, kv_heads) = self.heads.ok_or_else(|| missing("h=", "heads as H/G, or H when G is equal"))?;
        if heads == 0 || kv_heads == 0 {
            return Err(Error::invalid("h= needs at least 1 query head and 1 key/value head, got 0"));
        }
        let head_dim = match (self.d, self.e) {
            (Some(d), _) => d,
            (None, Some(e)) if e % heads == 0 => e / heads,
            (None, Some(e)) => {
                return Err(Error::invalid(format!("d= is needed, since e ({e}) is not a multiple of h ({heads})")));
            }
            (None, None) => return Err(missing("d=", "dimensions of a head")),
        };
        Ok(AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            causal: self.causal.unwrap_or(true),
            window: self.window,
            scale: self.scale,
            softcap: self.softcap,
            sinks: self.sinks.is_some(),
            alibi: self.alibi.is_some(),
        })
    }
}

fn missing(token: &str, meaning: &str) -> Error {
    Error::invalid(format!("token '{token}' is missing ({meaning})"))
}

fn biases(token: &str, letters: &str) -> Result<Biases> {
    let accepted = "bias= with one or more of the letters q, k, v, o, each once";
    let mut biases = Biases::default();
    for letter in letters.chars() {
        let slot = match letter {
            'q' => &mut biases.q,
            'k' => &mut biases.k,
            'v' => &mut biases.v,
            'o' => &mut biases.o,
            _ => return Err(malformed(token, accepted)),
        };
        if std::mem::replace(slot, true) {
            return Err(malformed(token, accepted));
        }
    }
    if letters.is_empty() { Err(malformed(token, accepted)) } else { Ok(biases) }
}

/// Parses and validates.
impl FromStr for BlockProblem {
    type Err = Error;
    fn from_str(line: &str) -> Result<Self> {
        let fields = Fields::parse(line, "block", BLOCK_TOKENS)?;
        let dtype = fields.dtype.unwrap_or(DType::F32);
        let spec = BlockSpec {
            hidden_size: fields.e.ok_or_else(|| missing("e=", "hidden size"))?,
            attention: fields.attention()?,
            qk_norm: fields.qk_norm,
            input_norm: fields.input_norm,
            residual: fields.residual.is_some(),
            rope: fields.rope.clone(),
            biases: fields.biases.unwrap_or_default(),
        };
        let kv_dtype = fields.kv.unwrap_or(dtype.into());
        let batch = fields.batch()?;
        let (weights, mask, page_size) = (fields.weights.unwrap_or_default(), fields.mask, fields.page);
        let problem = BlockProblem { spec, batch, mask, dtype, weights, kv_dtype, page_size };
        problem.validate()?;
        Ok(problem)
    }
}

/// Parses and validates.
impl FromStr for AttentionProblem {
    type Err = Error;
    fn from_str(line: &str) -> Result<Self> {
        let fields = Fields::parse(line, "attention", ATTENTION_TOKENS)?;
        let dtype = fields.dtype.unwrap_or(DType::F32);
        let kv_dtype = fields.kv.unwrap_or(dtype.into());
        let problem = AttentionProblem { spec: fields.attention()?, batch: fields.batch()?, mask: fields.mask, dtype, kv_dtype };
        problem.validate()?;
        Ok(problem)
    }
}

/// Parses what it prints; ranges are checked by [`RopeSpec::validate`], which needs the head dimension.
impl FromStr for RopeSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let mut items = text.split(',');
        let layout = match items.next() {
            Some("half") => RopeLayout::Half,
            Some("interleaved") => RopeLayout::Interleaved,
            other => {
                let accepted = "half or interleaved first, then options behind commas, as in rope=half,theta=500000";
                return Err(malformed(other.unwrap_or(""), accepted));
            }
        };
        let (mut theta, mut rotary_dim, mut scaling) = (None, None, None);
        for item in items {
            match item.split_once('=') {
                Some(("theta", v)) => set(&mut theta, item, real(item, v)?)?,
                Some(("dim", v)) => set(&mut rotary_dim, item, integer(item, v)?)?,
                _ => set(&mut scaling, item, parse_scaling(item)?)?,
            }
        }
        let scaling = scaling.unwrap_or_default();
        Ok(RopeSpec { layout, rotary_dim, scaling, ..RopeSpec::new(theta.map_or(DEFAULT_THETA, Real::get)) })
    }
}

fn parse_scaling(item: &str) -> Result<RopeScaling> {
    let parts: Vec<&str> = item.split(':').collect();
    let (kind, rest) = (parts[0], &parts[1..]);
    let (fixed, options) = rest.split_at(rest.iter().position(|p| p.contains('=')).unwrap_or(rest.len()));
    let options = |names: &[&str]| named(item, options, names);
    match (kind, fixed) {
        ("linear", [factor]) => {
            options(&[])?;
            Ok(RopeScaling::Linear { factor: real(item, factor)? })
        }
        ("dynamic", [factor, original]) => {
            options(&[])?;
            Ok(RopeScaling::Dynamic { factor: real(item, factor)?, original: integer(item, original)? })
        }
        ("llama3", [factor, low, high, original]) => {
            options(&[])?;
            Ok(RopeScaling::Llama3 {
                factor: real(item, factor)?,
                low: real(item, low)?,
                high: real(item, high)?,
                original: integer(item, original)?,
            })
        }
        ("yarn", [factor, original]) => {
            let names = ["beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"];
            let given = options(&names)?;
            let number = |i: usize| given[i].map(|v| real(item, v)).transpose();
            let truncate = match given[2] {
                None | Some("true") => true,
                Some("false") => false,
                Some(_) => return Err(malformed(item, "truncate=true, truncate=false")),
            };
            Ok(RopeScaling::Yarn(Yarn {
                factor: real(item, factor)?,
                original: integer(item, original)?,
                beta_fast: number(0)?,
                beta_slow: number(1)?,
                truncate,
                attention_factor: number(3)?,
                mscale: number(4)?,
                mscale_all_dim: number(5)?,
            }))
        }
        ("longrope", [short, long, original]) => {
            let given = options(&["factor", "attention_factor"])?;
            let number = |i: usize| given[i].map(|v| real(item, v)).transpose();
            Ok(RopeScaling::LongRope {
                short: reals(item, short)?,
                long: reals(item, long)?,
                original: integer(item, original)?,
                factor: number(0)?,
                attention_factor: number(1)?,
            })
        }
        _ => Err(malformed(
            item,
            "theta=X, dim=N, linear:FACTOR, dynamic:FACTOR:ORIGINAL, llama3:FACTOR:LOW:HIGH:ORIGINAL, yarn:FACTOR:ORIGINAL with \
             options, longrope:SHORT/…:LONG/…:ORIGINAL with options",
        )),
    }
}

/// The values of `options`, each `name=value`, in the order of `names`.
fn named<'a>(item: &str, options: &[&'a str], names: &[&str]) -> Result<Vec<Option<&'a str>>> {
    let mut values = vec![None; names.len()];
    for option in options {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let Some(i) = names.iter().position(|n| *n == name) else {
            let accepted = if names.is_empty() { "no options here".into() } else { format!("options {}", names.join(", ")) };
            return Err(malformed(item, &format!("{accepted}, found {}", quote(option))));
        };
        set(&mut values[i], option, value)?;
    }
    Ok(values)
}

//! Problems that cross every feature, small enough that the oracle answers at once.

use lawson_core::{
    CacheDType, DType, WeightKind,
    problem::{
        AttentionSpec, Biases, BlockProblem, BlockSpec, Lengths, MaskShape, PAGE_SIZES, Real, RopeLayout, RopeScaling, RopeSpec,
        Yarn,
    },
};

use crate::rng::Rng;

/// Lengths around the edges of tiles of 16, 32, 48, 64 and 128 rows: t − 1, t, t + 1, 2t + 1, and 0 and 1.
pub const EDGES: [usize; 15] = [0, 1, 15, 16, 17, 31, 32, 33, 47, 49, 63, 64, 65, 127, 129];

/// Head dimensions in use, and one that is odd.
pub const HEAD_DIMS: [usize; 9] = [16, 32, 33, 64, 80, 96, 112, 128, 256];

/// (H, G): MHA, GQA and MQA.
pub const HEADS: [(usize, usize); 9] = [(1, 1), (2, 2), (3, 3), (4, 2), (6, 2), (8, 2), (5, 1), (8, 1), (9, 3)];

/// (compute, cache).
pub const DTYPES: [(DType, CacheDType); 8] = [
    (DType::F32, CacheDType::F32),
    (DType::F32, CacheDType::F32),
    (DType::BF16, CacheDType::BF16),
    (DType::F16, CacheDType::F16),
    (DType::F32, CacheDType::BF16),
    (DType::F32, CacheDType::F16),
    (DType::BF16, CacheDType::F16),
    (DType::BF16, CacheDType::F32),
];

/// Every broadcast kind of a mask.
pub const MASKS: [MaskShape; 4] = [
    MaskShape { per_sequence: false, per_head: false },
    MaskShape { per_sequence: true, per_head: false },
    MaskShape { per_sequence: false, per_head: true },
    MaskShape { per_sequence: true, per_head: true },
];

/// Floating-point operations and cache elements that keep the oracle fast.
const MOST_FLOPS: f64 = 4e7;
const MOST_CACHE: usize = 400_000;

const FEATURES: usize = 18;

/// Which features a random case has: four by force, each other one time in five, so that all pairs and most triples occur.
struct Features {
    forced: u32,
}

impl Features {
    fn new(rng: &mut Rng) -> Self {
        let mut forced = 0u32;
        while forced.count_ones() < 4 {
            forced |= 1 << rng.below(FEATURES);
        }
        Features { forced }
    }
    fn on(&self, feature: usize, rng: &mut Rng) -> bool {
        self.forced >> feature & 1 == 1 || rng.chance(0.2)
    }
}

fn real(v: f64) -> Real {
    Real::new(v).expect("the cases' numbers are finite")
}

fn small(problem: &BlockProblem) -> bool {
    let (batch, a) = (&problem.batch, &problem.spec.attention);
    let cache = batch.sequences() * batch.max_len() * a.kv_dim();
    problem.flops() <= MOST_FLOPS && cache <= MOST_CACHE && problem.validate().is_ok()
}

/// `count` random problems.
pub fn random_cases(seed: u64, count: usize) -> Vec<BlockProblem> {
    let mut rng = Rng::new(seed);
    (0..count).map(|_| random_case(&mut rng)).collect()
}

/// `count` random problems over a paged cache, of every page size in turn.
pub fn paged_cases(seed: u64, count: usize) -> Vec<BlockProblem> {
    let paged = |(problem, rows)| BlockProblem { page_size: Some(rows), ..problem };
    random_cases(seed, count).into_iter().zip(PAGE_SIZES.into_iter().cycle()).map(paged).collect()
}

/// `count` random problems over a quantised cache, of every kind in turn.
pub fn quantised_cases(seed: u64, count: usize) -> Vec<BlockProblem> {
    let quantised = |(problem, kv_dtype)| BlockProblem { kv_dtype, ..problem };
    let kinds = [CacheDType::INT8, CacheDType::INT4].into_iter().cycle();
    random_cases(seed, count).into_iter().zip(kinds).map(quantised).collect()
}

/// Decode over a quantised cache at the edges of its groups of 32 rows, in every dtype and with every kind of score rule: group sizes of 1 to
/// 9 heads, rows of whole vectors of every instruction set.
pub fn quantised_decode_cases() -> Vec<BlockProblem> {
    const SHAPES: [&str; 9] = [
        "h=8/1 d=64 past=300",
        "h=4/1 d=128 past=95",
        "h=6/2 d=64 past=64 qk_norm=1e-6",
        "h=2/2 d=32 past=200 window=45",
        "h=5/1 d=256 past=130 softcap=20 alibi",
        "h=9/3 d=64 past=31 sinks",
        "h=3/3 d=64 past=33 mask=h",
        "h=8/2 d=128 past=0",
        "h=7/1 d=192 past=126 window=64 scale=-0.1",
    ];
    let (dtypes, kinds) = (["bf16", "f16", "f32"], ["int8", "int4"]);
    let mut cases = Vec::new();
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for kind in kinds {
            let line = format!("block b=1 s=1 e=64 {shape} causal {} kv={kind}", dtypes[i % 3]);
            cases.push(line.parse().expect("a problem"));
        }
    }
    for kind in kinds {
        let line = format!("block b=4 s=1 past=3,64,100,31 e=48 h=8/2 d=64 causal bf16 kv={kind}");
        cases.push(line.parse().expect("a problem"));
    }
    cases
}

/// `count` random problems whose weights are in int8, over a quantised cache every third time.
pub fn int8_weight_cases(seed: u64, count: usize) -> Vec<BlockProblem> {
    let caches = [None, None, Some(CacheDType::INT8), None, None, Some(CacheDType::INT4)].into_iter().cycle();
    let int8 = |(problem, cache): (BlockProblem, Option<CacheDType>)| {
        let kv_dtype = cache.unwrap_or(problem.kv_dtype);
        BlockProblem { weights: WeightKind::Int8, kv_dtype, ..problem }
    };
    random_cases(seed, count).into_iter().zip(caches).map(int8).collect()
}

/// A random problem that crosses at least four features.
pub fn random_case(rng: &mut Rng) -> BlockProblem {
    let features = Features::new(rng);
    loop {
        let problem = draw(&features, rng);
        if small(&problem) {
            return problem;
        }
    }
}

fn draw(features: &Features, rng: &mut Rng) -> BlockProblem {
    let mut next = 0;
    let mut on = |rng: &mut Rng| {
        next += 1;
        features.on(next - 1, rng)
    };
    let batch = batch(on(rng), on(rng), on(rng), rng);
    let (heads, kv_heads) = rng.pick(&HEADS);
    let mut attention = AttentionSpec::new(heads, kv_heads, rng.pick(&HEAD_DIMS));
    attention.causal = !on(rng);
    if on(rng) && attention.causal {
        attention.window = Some(rng.pick(&[1, 7, 15, 16, 17, 63, 64, 65, 100, 1000]));
    }
    attention.scale = on(rng).then(|| real(rng.pick(&[0.02, 0.2, 1.0, -0.1])));
    attention.softcap = on(rng).then(|| real(rng.pick(&[2.0, 20.0, 50.0])));
    attention.sinks = on(rng);
    attention.alibi = on(rng);
    let hidden = if rng.chance(0.3) { attention.q_dim().min(256) } else { rng.pick(&[33, 48, 64, 65, 96, 192, 256]) };
    let mut spec = BlockSpec::new(hidden, attention);
    spec.qk_norm = on(rng).then(|| real(rng.pick(&[1e-6, 1e-5])));
    spec.input_norm = on(rng).then(|| real(rng.pick(&[1e-6, 1e-5])));
    spec.residual = on(rng);
    if on(rng) {
        let every = rng.chance(0.4);
        let mut one = || every || rng.chance(0.5);
        spec.biases = Biases { q: one(), k: one(), v: one(), o: one() };
    }
    let (partial, interleaved, scaled) = (on(rng), on(rng), on(rng));
    if rng.chance(0.8) || partial || interleaved || scaled {
        spec.rope = Some(rope(partial, interleaved, scaled, spec.attention.head_dim, batch.max_len(), rng));
    }
    let mask = on(rng).then(|| rng.pick(&MASKS));
    let (dtype, kv_dtype) = rng.pick(&DTYPES);
    BlockProblem { mask, kv_dtype, ..BlockProblem::new(spec, batch, dtype) }
}

fn batch(ragged_past: bool, ragged_new: bool, decode: bool, rng: &mut Rng) -> Lengths {
    let sequences = if ragged_past || ragged_new { rng.pick(&[2, 3, 3, 5]) } else { rng.pick(&[1, 1, 2, 3]) };
    let new = if decode { 1 } else { rng.pick(&[1, 2, 5, 16, 17, 33, 63, 64, 65, 130, 257]) };
    let past = if decode || ragged_past { rng.pick(&[1, 31, 63, 64, 65, 129, 513]) } else { rng.pick(&[0, 0, 1, 31, 64, 100]) };
    let mut news = vec![new; sequences];
    if ragged_new {
        news.iter_mut().skip(1).for_each(|n| *n = 1 + rng.below(new + 3));
    }
    let mut pasts = vec![past; sequences];
    if ragged_past {
        pasts.iter_mut().for_each(|p| *p = rng.below(past + 1));
        let at = rng.below(sequences);
        pasts[at] = rng.pick(&[0, past]);
    }
    Lengths::ragged(news, pasts).expect("every sequence has a new token")
}

fn rope(partial: bool, interleaved: bool, scaled: bool, head_dim: usize, longest: usize, rng: &mut Rng) -> RopeSpec {
    let even = head_dim / 2 * 2;
    let rotary = if partial { (rng.pick(&[head_dim / 2, head_dim / 4, 2 * head_dim / 5]) / 2 * 2).max(2) } else { even };
    let scaling = if scaled && rotary > 2 { scaling(rng.below(5), rotary / 2, longest, rng) } else { RopeScaling::Default };
    RopeSpec {
        layout: if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half },
        rotary_dim: (rotary != head_dim || rng.chance(0.3)).then_some(rotary),
        scaling,
        ..RopeSpec::new(rng.pick(&[1e4, 1e4, 5e5, 1e6]))
    }
}

/// The `kind`th of the five scalings, its original length on either side of the longest sequence where that matters.
fn scaling(kind: usize, pairs: usize, longest: usize, rng: &mut Rng) -> RopeScaling {
    let factor = real(rng.pick(&[2.0, 4.0, 32.0]));
    let near = rng.pick(&[16, longest.saturating_sub(1), longest, longest + 1]).max(2);
    let band = rng.pick(&[16, 64, 256, 4096]);
    match kind {
        0 => RopeScaling::Linear { factor },
        1 => RopeScaling::Dynamic { factor, original: near },
        2 => RopeScaling::Llama3 { factor, low: real(1.0), high: real(4.0), original: band },
        3 => {
            let (beta_fast, beta_slow) = rng.pick(&[(None, None), (Some(real(8.0)), Some(real(2.0)))]);
            let attention_factor = rng.chance(0.3).then(|| real(0.8));
            let mscale = rng.chance(0.4).then(|| real(0.7));
            let mscale_all_dim = mscale.filter(|_| rng.chance(0.8)).map(|_| real(1.3));
            let truncate = rng.chance(0.6);
            let y = Yarn { factor, original: band, beta_fast, beta_slow, truncate, attention_factor, mscale, mscale_all_dim };
            RopeScaling::Yarn(y)
        }
        _ => {
            let mut divisors = |spread: f64| (0..pairs).map(|_| real(1.0 + spread * rng.uniform())).collect();
            let (short, long) = (divisors(0.2), divisors(3.0));
            let attention_factor = rng.chance(0.4).then(|| real(1.2));
            let factor = Some(real(rng.pick(&[1.0, 2.5, 8.0])));
            RopeScaling::LongRope { short, long, original: near, factor, attention_factor }
        }
    }
}

/// Every new length of [`EDGES`] after every past length of it, each with other heads, head dimension, dtypes and features.
pub fn edge_cases() -> Vec<BlockProblem> {
    let mut rng = Rng::new(0xed6e);
    let mut cases = Vec::new();
    for &new in EDGES.iter().filter(|&&n| n > 0) {
        for past in EDGES {
            let turn = cases.len();
            cases.push(loop {
                let mut problem = random_case(&mut rng);
                let attention = &mut problem.spec.attention;
                attention.head_dim = HEAD_DIMS[turn % HEAD_DIMS.len()];
                (attention.heads, attention.kv_heads) = if new + past > 100 { rng.pick(&HEADS[..5]) } else { rng.pick(&HEADS) };
                problem.batch = Lengths::uniform(if new + past > 100 { 1 } else { 1 + turn % 2 }, new, past);
                let (head_dim, longest) = (attention.head_dim, problem.batch.max_len());
                problem.spec.hidden_size = rng.pick(&[33, 48, 64, 65]);
                if problem.spec.rope.is_some() {
                    let flags = [rng.chance(0.3), rng.chance(0.5), rng.chance(0.5)];
                    problem.spec.rope = Some(rope(flags[0], flags[1], flags[2], head_dim, longest, &mut rng));
                }
                if small(&problem) {
                    break problem;
                }
            });
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_valid_and_prints_a_line_that_parses_back() {
        for case in random_cases(1, 300)
            .into_iter()
            .chain(edge_cases())
            .chain(paged_cases(3, 30))
            .chain(quantised_cases(4, 30))
            .chain(quantised_decode_cases())
            .chain(int8_weight_cases(5, 30))
        {
            assert_eq!(case.to_string().parse::<BlockProblem>().unwrap(), case);
        }
    }

    #[test]
    fn every_feature_occurs() {
        let lines: Vec<String> = random_cases(2, 300).iter().map(ToString::to_string).collect();
        let wanted = "full window= scale= softcap= sinks alibi mask=b mask=h mask=bh qk_norm= input_norm= residual bias= interleaved dim= \
             linear: dynamic: llama3: yarn: longrope: bf16 f16 kv=bf16 kv=f16 kv=f32 d=33 d=80 d=96 d=112 d=128 d=256 past=0";
        for token in wanted.split_whitespace() {
            assert!(lines.iter().any(|l| l.contains(token)), "no case has {token}");
        }
        assert!(lines.iter().any(|l| l.split(' ').any(|t| t == "mask")));
    }
}

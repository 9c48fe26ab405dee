//! Quantised caches: codes that do not depend on chunking, calls that can be repeated, truncation, rows that are not finite.

#[allow(dead_code, reason = "other tests use the rest")]
mod files;

use files::refused;
use lawson::{
    Args, AttentionBlock, Batch, BlockProblem, BlockWeights, CacheDType, Context, ContextOptions, Device, KvCache, Level, Tensor,
};
use lawson_core::quantised::Codes;
use lawson_testkit::{
    inputs::{Sharpness, data_for},
    rng::Rng,
};

const KINDS: [(CacheDType, Codes); 2] = [(CacheDType::INT8, Codes::Int8), (CacheDType::INT4, Codes::Int4)];
/// D is odd and has two blocks of channels.
const BLOCK: &str = "block b=1 s=1 e=48 h=4/2 d=33 causal bias=qkvo qk_norm=1e-6 residual";
const E: usize = 48;
const D: usize = 33;

fn context(threads: usize) -> Context {
    Context::new(ContextOptions { device: Device::Cpu, threads: Some(threads), ..Default::default() }).unwrap()
}

fn block(context: &Context, line: &str) -> AttentionBlock {
    let problem: BlockProblem = line.parse().unwrap();
    let data = data_for(&problem, 11, Sharpness::Ordinary);
    let weights = BlockWeights::from_data(&problem.spec, &data).unwrap();
    AttentionBlock::builder(problem.spec.clone(), weights).dtype(problem.dtype).build(context).unwrap()
}

fn cache(block: &AttentionBlock, sequences: usize, dtype: impl Into<CacheDType>) -> KvCache {
    KvCache::new(block.context(), &block.spec().attention, 1, sequences, 200, dtype).unwrap()
}

/// x of tokens `from` … `to` of a sequence.
fn tokens(from: usize, to: usize) -> Vec<f32> {
    Rng::new(5).normals(200 * E, 1.0)[from * E..to * E].to_vec()
}

/// One call behind the valid rows of each sequence; not committed.
fn forward(block: &AttentionBlock, cache: &mut KvCache, new: &[usize], x: &[f32]) -> Vec<f32> {
    let batch = Batch::ragged(new.to_vec()).unwrap();
    let x = Tensor::from_f32(x, block.dtype(), &[batch.tokens(), E]).unwrap();
    let mut y = Tensor::from_f32(&vec![f32::NAN; batch.tokens() * E], block.dtype(), &[batch.tokens(), E]).unwrap();
    block.forward(Args { x: x.as_ref(), batch: &batch, mask: None, cache: cache.layer(0), y: y.as_mut() }).unwrap();
    y.to_f32()
}

/// Appends `chunks` tokens from the first of `from` on, call by call.
fn append(block: &AttentionBlock, cache: &mut KvCache, mut from: usize, chunks: &[usize]) {
    for &n in chunks {
        forward(block, cache, &[n], &tokens(from, from + n));
        cache.commit(&Batch::uniform(1, n).unwrap()).unwrap();
        from += n;
    }
}

/// Bits of the keys and values of the first sequence.
fn bits(cache: &KvCache, rows: usize) -> [Vec<u32>; 2] {
    let (k, v) = cache.export(0, 0, rows).unwrap();
    [k, v].map(|x| x.iter().map(|x| x.to_bits()).collect())
}

/// Bits of the first `rows` of `all` rows of each head.
fn first(all: &[Vec<u32>; 2], rows: usize) -> [Vec<u32>; 2] {
    let of = |x: &Vec<u32>| x.chunks_exact(x.len() / 2).flat_map(|head| head[..rows * D].to_vec()).collect();
    [of(&all[0]), of(&all[1])]
}

#[test]
fn codes_do_not_depend_on_chunks_or_levels() {
    const ROWS: usize = 100;
    let context = context(2);
    for dtype in ["f32", "bf16", "f16"] {
        let built = block(&context, &format!("{BLOCK} rope=half,dim=32 {dtype}"));
        let mut plain = cache(&built, 1, built.dtype());
        append(&built.at(Some(Level::Maximal)), &mut plain, 0, &[ROWS]);
        for (kind, codes) in KINDS {
            // Straight from the definition, whole rows of one head after another.
            let (mut k, mut v) = plain.export(0, 0, ROWS).unwrap();
            for (k, v) in k.chunks_exact_mut(ROWS * D).zip(v.chunks_exact_mut(ROWS * D)) {
                codes.keys_through_codes(k, D);
                codes.values_through_codes(v, D);
            }
            let want = [k, v].map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            for level in Level::ALL {
                let block = built.at(Some(level));
                for chunks in [&[ROWS][..], &[31, 1, 33, 35], &[64, 36], &[1; ROWS]] {
                    let mut cache = cache(&block, 1, kind);
                    append(&block, &mut cache, 0, chunks);
                    assert!(bits(&cache, ROWS) == want, "{dtype} {kind} {level} {} calls", chunks.len());
                }
            }
        }
    }
}

#[test]
fn a_call_can_be_repeated_until_it_is_committed() {
    let context = context(2);
    let block = block(&context, BLOCK);
    for (kind, _) in KINDS {
        for past in [0, 20, 32, 40] {
            let mut once = cache(&block, 1, kind);
            append(&block, &mut once, 0, &[past][usize::from(past == 0)..]);
            let before = bits(&once, past);
            let y = forward(&block, &mut once, &[60], &tokens(past, past + 60));
            let written = bits(&once, past + 60);
            // Whatever a call has written behind them, the valid rows are as they were.
            for n in [1, 70, 33] {
                forward(&block, &mut once, &[n], &tokens(0, n));
                assert!(bits(&once, past) == before, "{kind} {past} {n}");
            }
            assert!(forward(&block, &mut once, &[60], &tokens(past, past + 60)) == y, "{kind} {past}");
            assert!(bits(&once, past + 60) == written, "{kind} {past}");
            once.commit(&Batch::uniform(1, 60).unwrap()).unwrap();
            assert!(bits(&once, past + 60) == written, "{kind} {past}");
            let mut other = cache(&block, 1, kind);
            append(&block, &mut other, 0, &[past + 60]);
            assert!(bits(&other, past + 60) == written, "{kind} {past}");
        }
    }
}

#[test]
fn fewer_rows_than_a_call_has_written_may_be_committed() {
    let context = context(2);
    let block = block(&context, BLOCK);
    for (kind, _) in KINDS {
        // Within the group that was open before: its rows are as if no more had come.
        let mut some = cache(&block, 1, kind);
        append(&block, &mut some, 0, &[40]);
        forward(&block, &mut some, &[60], &tokens(40, 100));
        some.commit(&Batch::uniform(1, 8).unwrap()).unwrap();
        let mut want = cache(&block, 1, kind);
        append(&block, &mut want, 0, &[48]);
        assert!(bits(&some, 48) == bits(&want, 48), "{kind}");
        append(&block, &mut some, 48, &[52]);
        append(&block, &mut want, 48, &[52]);
        assert!(bits(&some, 100) == bits(&want, 100), "{kind}");
        // In a group that the call has finished: its codes stay.
        let mut later = cache(&block, 1, kind);
        append(&block, &mut later, 0, &[40]);
        forward(&block, &mut later, &[60], &tokens(40, 100));
        later.commit(&Batch::uniform(1, 30).unwrap()).unwrap();
        assert!(bits(&later, 70) == first(&bits(&want, 100), 70), "{kind}");
    }
}

#[test]
fn truncation_reopens_a_group_from_its_codes() {
    let context = context(2);
    let block = block(&context, BLOCK);
    for (kind, codes) in KINDS {
        for (rows, len) in [(100, 98), (100, 96), (100, 70), (100, 64), (100, 5), (64, 63), (100, 0)] {
            let mut cut = cache(&block, 1, kind);
            append(&block, &mut cut, 0, &[rows]);
            let kept = first(&bits(&cut, rows), len);
            cut.truncate(0, len).unwrap();
            assert!(bits(&cut, len) == kept, "{kind} {rows} {len}");
            // Other tokens follow: the group is quantised from what its first rows read as.
            let mut plain = cache(&block, 1, block.dtype());
            append(&block, &mut plain, 0, &[len][usize::from(len == 0)..]);
            append(&block, &mut plain, 120, &[40]);
            append(&block, &mut cut, 120, &[40]);
            let mut want = plain.export(0, 0, len + 40).unwrap().0;
            for (head, want) in want.chunks_exact_mut((len + 40) * D).enumerate() {
                let kept = &kept[0][head * len * D..][..len * D];
                want.iter_mut().zip(kept).for_each(|(x, kept)| *x = f32::from_bits(*kept));
                // Finished groups that were kept are codes already.
                codes.keys_through_codes(&mut want[len / 32 * 32 * D..], D);
            }
            assert!(bits(&cut, len + 40)[0] == want.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), "{kind} {rows} {len}");
        }
        let mut cut = cache(&block, 1, kind);
        append(&block, &mut cut, 0, &[40]);
        refused(cut.truncate(0, 41), &["40 rows", "41"]);
        cut.reset();
        assert_eq!(cut.lengths(), [0]);
        append(&block, &mut cut, 0, &[40]);
        let mut fresh = cache(&block, 1, kind);
        append(&block, &mut fresh, 0, &[40]);
        assert!(bits(&cut, 40) == bits(&fresh, 40));
    }
}

#[test]
fn rows_that_are_not_finite_reach_only_who_sees_them() {
    let context = context(2);
    let mut rng = Rng::new(8);
    // Decode multiplies codes as they are where D is a multiple of 32.
    for (d, (kind, codes)) in [33, 64].into_iter().flat_map(|d| KINDS.map(|kind| (d, kind))) {
        let block = block(&context, &format!("block b=1 s=1 e=48 h=4/2 d={d} causal window=20"));
        let clean = [rng.normals(2 * 50 * d, 1.0), rng.normals(2 * 50 * d, 1.0)];
        let [mut k, mut v] = clean.clone();
        // Head 0: keys of rows 3 and 40 (a finished group and the tail), a value of row 4. Head 1: a value of row 7.
        k[3 * d + 5] = f32::INFINITY;
        k[40 * d] = f32::NAN;
        v[4 * d + 32] = f32::INFINITY;
        v[(50 + 7) * d] = f32::NAN;
        let mut cache = cache(&block, 1, kind);
        cache.import(0, 0, 50, &k, &v).unwrap();
        let (got_k, got_v) = cache.export(0, 0, 50).unwrap();
        for (i, row) in got_k.chunks_exact(d).enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), i == 3, "{kind} key {i}");
            assert!(i == 3 || row.iter().filter(|x| !x.is_finite()).count() == usize::from(i == 40), "{kind} key {i}");
        }
        for (i, row) in got_v.chunks_exact(d).enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), [4, 57].contains(&i), "{kind} value {i}");
            assert!([4, 57].contains(&i) || row.iter().all(|x| x.is_finite()), "{kind} value {i}");
        }
        // The other rows of the group: as if the row had been another of them.
        let mut others = clean[0][..32 * d].to_vec();
        others.copy_within(0..d, 3 * d);
        codes.keys_through_codes(&mut others, d);
        assert!(got_k[..3 * d] == others[..3 * d] && got_k[4 * d..32 * d] == others[4 * d..], "{kind}");
        // A query sees 20 rows: one at 42 sees row 40, one at 27 none of them. Values weigh 0 where they are not seen, and NaN · 0 is NaN, so that
        // these are clean.
        for (past, lost) in [(42, true), (27, false), (22, true), (40, false)] {
            cache.import(0, 0, 50, &k, &clean[1]).unwrap();
            cache.truncate(0, past).unwrap();
            for level in Level::ALL {
                let y = forward(&block.at(Some(level)), &mut cache, &[1], &tokens(0, 1));
                assert!(y.iter().all(|y| y.is_nan() == lost), "{kind} {past} {level}: {y:?}");
            }
        }
    }
}

#[test]
fn layers_have_groups_of_their_own() {
    let context = context(2);
    let block = block(&context, BLOCK);
    for (kind, _) in KINDS {
        let mut both = KvCache::new(&context, &block.spec().attention, 2, 1, 100, kind).unwrap();
        for (from, n) in [(0, 40), (40, 30), (70, 1)] {
            let batch = Batch::uniform(1, n).unwrap();
            for layer in 0..2 {
                let x = Tensor::from_f32(&tokens(from + layer, from + layer + n), block.dtype(), &[n, E]).unwrap();
                block.forward_alloc(x.as_ref(), &batch, None, both.layer(layer)).unwrap();
            }
            both.commit(&batch).unwrap();
        }
        both.truncate(0, 60).unwrap();
        let expect = |both: &KvCache, layer, rows| {
            let mut alone = cache(&block, 1, kind);
            append(&block, &mut alone, layer, &[71]);
            alone.truncate(0, rows).unwrap();
            assert_eq!(both.export(layer, 0, rows).unwrap(), alone.export(0, 0, rows).unwrap(), "{kind} {layer} {rows}");
        };
        expect(&both, 0, 60);
        expect(&both, 1, 60);
        // Replacing one layer shortens the others.
        let (k, v) = both.export(0, 0, 20).unwrap();
        both.import(0, 0, 20, &k, &v).unwrap();
        expect(&both, 1, 20);
    }
}

#[test]
fn sequences_and_threads_do_not_meet() {
    let mut results = Vec::new();
    for threads in [1, 2, 3] {
        let context = context(threads);
        let block = block(&context, &format!("{BLOCK} rope=half,dim=32 bf16"));
        let mut cache = cache(&block, 3, CacheDType::INT8);
        let mut ys = Vec::new();
        for new in [[33, 1, 64], [1, 70, 3], [1, 1, 1]] {
            let x: Vec<f32> = new.iter().enumerate().flat_map(|(b, n)| tokens(7 * b, 7 * b + n)).collect();
            ys.push(forward(&block, &mut cache, &new, &x));
            cache.commit(&Batch::ragged(new.to_vec()).unwrap()).unwrap();
        }
        results.push((ys, (0..3).map(|b| cache.export(0, b, cache.lengths()[b]).unwrap()).collect::<Vec<_>>()));
    }
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn caches_keep_their_budget() {
    let context = context(1);
    for head_dim in [64, 128] {
        let spec = lawson::AttentionSpec::new(8, 2, head_dim);
        let bytes = |dtype| KvCache::new(&context, &spec, 2, 1, 16384, dtype).unwrap().bytes() as f64;
        let plain = bytes(CacheDType::BF16);
        assert!(bytes(CacheDType::INT8) <= 0.54 * plain && bytes(CacheDType::INT4) <= 0.32 * plain);
    }
    let spec = lawson::AttentionSpec::new(8, 2, 64);
    refused(KvCache::new(&context, &spec, usize::MAX / 2, 2, 1, CacheDType::INT4), &["too large"]);
    refused(KvCache::new(&context, &spec, 1, 1, usize::MAX - 100, CacheDType::INT8), &["too large"]);
}

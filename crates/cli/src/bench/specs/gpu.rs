//! The configurations of a GPU's presets: the article's sizes whole, and those of attention and decoding that GPUs are compared by.

use lawson::DType;

use super::{Case, LAYER, Shape, Study, rope, softmax};

/// The article's three models, batch, tokens and hidden size.
const MODELS: [(usize, usize, usize); 3] = [(16, 512, 1024), (8, 1024, 2048), (4, 2048, 4096)];
/// Tokens of all sequences together in the study of attention, and columns of all heads.
const TOKENS: usize = 16_384;
const COLUMNS: usize = 2048;

fn model((batch, seq, hidden): (usize, usize, usize), dtype: DType) -> Case {
    Case::new(Study::Block, Shape::block(seq, hidden).batch(batch).dtype(dtype)).detailed()
}

/// A block that decodes one token of each sequence, which is row `rows` of its cache.
fn decoding(batch: usize, rows: usize, kv_heads: usize) -> Case {
    let shape = Shape::block(1, 4096).heads(32, kv_heads, 128).batch(batch).dtype(DType::BF16);
    Case::new(Study::Block, Shape { past: rows - 1, ..shape }).detailed()
}

/// Blocks of growing length.
fn sweep(dtype: DType, lengths: &[usize]) -> Vec<Case> {
    let of = |&seq: &usize| Case { peers: false, ..Case::new(Study::Block, Shape::block(seq, 1024).dtype(dtype)) };
    lengths.iter().map(of).collect()
}

/// The projection of `tokens` tokens.
fn projection(tokens: usize, hidden: usize, dtype: DType) -> Case {
    let seq = tokens.min(2048);
    let shape = Shape { causal: false, rope: false, ..Shape::block(seq, hidden).batch(tokens / seq).dtype(dtype) };
    Case::new(Study::Qkv, shape).variant("alone")
}

fn attention(seq: usize, head_dim: usize, causal: bool) -> Case {
    let heads = COLUMNS / head_dim;
    let shape = Shape::block(seq, COLUMNS).heads(heads, heads, head_dim).batch(TOKENS / seq).dtype(DType::BF16);
    Case::new(Study::Attention, Shape { causal, ..shape })
}

fn grouped(seq: usize) -> Case {
    Case::new(Study::Attention, Shape::block(seq, 4096).heads(32, 8, 128).batch(4).dtype(DType::BF16))
}

/// One new token of each sequence over `rows` rows, its own included.
fn decode(batch: usize, rows: usize, kv_heads: usize) -> Case {
    let shape = Shape::block(1, 4096).heads(32, kv_heads, 128).batch(batch).dtype(DType::BF16);
    Case::new(Study::Decode, Shape { past: rows - 1, ..shape })
}

fn throughput(batch: usize) -> Case {
    super::throughput(batch, 4096, Shape::block(1, 4096).heads(32, 8, 128).dtype(DType::BF16))
}

fn turned(batch: usize, dtype: DType) -> Case {
    let case = rope(batch, "");
    Case { shape: case.shape.dtype(dtype), ..case }
}

pub fn quick(study: Study) -> Vec<Case> {
    match study {
        Study::Block => {
            let mut cases = vec![model(MODELS[1], DType::BF16), model(MODELS[1], DType::F32), decoding(1, 4096, 8)];
            cases.extend(sweep(DType::BF16, &[128, 512, 2048]));
            cases
        }
        Study::Qkv => vec![projection(8192, 1024, DType::BF16), projection(1, 4096, DType::BF16)],
        Study::Softmax => vec![softmax(32, 1024, "")],
        Study::Rope => vec![turned(4, DType::BF16)],
        Study::Attention => [1024, 4096].map(|seq| attention(seq, 128, true)).to_vec(),
        Study::Decode => [(1, 4096), (1, 16_384), (8, 4096)].map(|(batch, rows)| decode(batch, rows, 8)).to_vec(),
        Study::Throughput => [1, 4, 16].map(throughput).to_vec(),
        Study::Kernels | Study::All | Study::Quality => Vec::new(),
    }
}

pub fn article(study: Study) -> Vec<Case> {
    let both = [DType::BF16, DType::F32];
    match study {
        Study::Block => {
            let mut cases: Vec<Case> = MODELS.map(|m| model(m, DType::BF16)).to_vec();
            // Peers compile each of their shapes for seconds: those that others stand for go without.
            cases.extend(MODELS.map(|m| Case { peers: m == MODELS[2], ..model(m, DType::F32) }));
            for kv_heads in [32, 8] {
                cases.extend([1024, 4096, 16_384].map(|rows| Case { peers: rows == 4096, ..decoding(1, rows, kv_heads) }));
            }
            cases.extend(sweep(DType::BF16, &[64, 128, 256, 512, 1024, 2048, 4096]));
            cases
        }
        Study::Qkv => {
            let sizes = [(65_536, 4096), (8192, 4096), (8192, 1024), (128, 4096), (1, 4096)];
            let mut cases = sizes.map(|(tokens, hidden)| projection(tokens, hidden, DType::BF16)).to_vec();
            cases.push(Case::new(Study::Qkv, LAYER.batch(16).dtype(DType::BF16)).variant("layer"));
            cases
        }
        Study::Softmax => [512, 1024, 2048, 4096].map(|seq| softmax(32, seq, "")).to_vec(),
        Study::Rope => both.iter().map(|&dtype| turned(32, dtype)).collect(),
        Study::Attention => {
            let mut cases = Vec::new();
            for causal in [false, true] {
                for head_dim in [64, 128] {
                    cases.extend([1024, 2048, 4096, 8192, 16_384].map(|seq| attention(seq, head_dim, causal)));
                }
                cases.extend([1024, 4096, 16_384].map(|seq| attention(seq, 256, causal)));
            }
            cases.extend([1024, 4096, 8192].map(grouped));
            cases
        }
        Study::Decode => {
            let cells = [(1, 4096), (1, 16_384), (1, 65_536), (8, 4096), (32, 4096), (32, 16_384), (128, 4096)];
            [32, 8].iter().flat_map(|&kv_heads| cells.map(|(batch, rows)| decode(batch, rows, kv_heads))).collect()
        }
        Study::Throughput => [1, 4, 16, 32].map(throughput).to_vec(),
        Study::Kernels | Study::All | Study::Quality => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_configuration_is_valid_and_stands_once() {
        for cases in [quick, article] {
            let all: Vec<Case> = Study::EACH.into_iter().flat_map(cases).collect();
            for (i, case) in all.iter().enumerate() {
                case.shape.validate(case.study).unwrap_or_else(|e| panic!("{}: {e}", case.name()));
                let same = |c: &Case| (c.study, c.variant, c.shape) == (case.study, case.variant, case.shape);
                assert!(!all[..i].iter().any(same), "{} stands twice", case.name());
            }
        }
    }

    #[test]
    fn attention_has_as_many_tokens_at_every_length() {
        let all = article(Study::Attention);
        let alike = all.iter().filter(|c| c.shape.kv_heads == c.shape.heads);
        assert!(alike.clone().count() > 20);
        for s in alike.map(|c| c.shape) {
            assert_eq!((s.batch * s.seq, s.heads * s.head_dim), (TOKENS, COLUMNS));
        }
    }
}

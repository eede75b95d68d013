//! Decoder-only stacks with random weights, as a directory for `qkv` and as the oracle's.

use std::collections::BTreeMap;

use qkv::gpu::{DType, Gpu};
use qkv::layers::Heads;
use qkv::model::{CausalModel, CausalSpec, Rope, RopeScaling, Source};
use qkv::ops::{Activation, Pairs};
use qkv::reference::{self, rope_frequencies};
use safetensors::tensor::{Dtype, TensorView};

use crate::compare::round_to;
use crate::grid::Random;

/// Stacks that differ in everything that a `CausalSpec` can say.
pub fn specs() -> Vec<(&'static str, CausalSpec)> {
    let heads = |heads, kv_heads, head_dim| Heads {
        heads,
        kv_heads,
        head_dim,
    };
    let rope = |base, columns, pairs, scaling| Rope {
        base,
        columns,
        pairs,
        scaling,
    };
    vec![
        (
            "grouped heads, tied, no bias",
            CausalSpec {
                width: 24,
                vocab: 37,
                layers: 2,
                heads: heads(6, 2, 8),
                ffn: 40,
                activation: Activation::Silu,
                norm_eps: 1e-5,
                qk_norm: false,
                qkv_bias: false,
                out_bias: false,
                ffn_bias: false,
                windows: vec![None, None],
                rope: rope(10000.0, 8, Pairs::Halves, RopeScaling::None),
                max_positions: 32,
                tied_logits: true,
            },
        ),
        (
            "neighbours, partly turned, all biases, norm of queries and keys, a window, odd widths",
            CausalSpec {
                width: 21,
                vocab: 31,
                layers: 3,
                heads: heads(3, 3, 10),
                ffn: 17,
                activation: Activation::Gelu,
                norm_eps: 1e-6,
                qk_norm: true,
                qkv_bias: true,
                out_bias: true,
                ffn_bias: true,
                windows: vec![Some(3), None, Some(1)],
                rope: rope(
                    500.0,
                    6,
                    Pairs::Neighbours,
                    RopeScaling::Linear { factor: 3.0 },
                ),
                max_positions: 20,
                tied_logits: false,
            },
        ),
        (
            "one KV head, YaRN, biases of queries, keys and values",
            CausalSpec {
                width: 32,
                vocab: 50,
                layers: 2,
                heads: heads(4, 1, 20),
                ffn: 48,
                activation: Activation::GeluTanh,
                norm_eps: 1e-5,
                qk_norm: false,
                qkv_bias: true,
                out_bias: false,
                ffn_bias: false,
                windows: vec![Some(4), Some(4)],
                rope: rope(
                    100.0,
                    20,
                    Pairs::Halves,
                    RopeScaling::Yarn {
                        factor: 4.0,
                        original: 16,
                        beta_fast: 2.0,
                        beta_slow: 0.5,
                        truncate: true,
                        attention_factor: 1.2,
                    },
                ),
                max_positions: 64,
                tied_logits: true,
            },
        ),
        (
            "heads of an odd width partly turned, Llama 3's scaling",
            CausalSpec {
                width: 15,
                vocab: 29,
                layers: 1,
                heads: heads(4, 2, 13),
                ffn: 33,
                activation: Activation::Silu,
                norm_eps: 1e-5,
                qk_norm: true,
                qkv_bias: false,
                out_bias: false,
                ffn_bias: false,
                windows: vec![None],
                rope: rope(
                    50.0,
                    12,
                    Pairs::Halves,
                    RopeScaling::Llama3 {
                        factor: 8.0,
                        low: 1.0,
                        high: 4.0,
                        original: 24,
                    },
                ),
                max_positions: 64,
                tied_logits: false,
            },
        ),
        (
            "a base that has grown",
            CausalSpec {
                width: 16,
                vocab: 23,
                layers: 2,
                heads: heads(2, 1, 8),
                ffn: 20,
                activation: Activation::Relu,
                norm_eps: 1e-5,
                qk_norm: false,
                qkv_bias: false,
                out_bias: true,
                ffn_bias: false,
                windows: vec![None, None],
                rope: rope(
                    100.0,
                    8,
                    Pairs::Neighbours,
                    RopeScaling::Dynamic {
                        factor: 3.0,
                        original: 6,
                    },
                ),
                max_positions: 18,
                tied_logits: true,
            },
        ),
    ]
}

/// The oracle's word for a scaling, in a context of that length.
pub fn scaling_of(scaling: &RopeScaling, context: usize) -> reference::RopeScaling {
    match *scaling {
        // A file's own factors come on top of plain frequencies.
        RopeScaling::None | RopeScaling::Factors(_) => reference::RopeScaling::None,
        RopeScaling::Linear { factor } => reference::RopeScaling::Linear { factor },
        RopeScaling::Dynamic { factor, original } => reference::RopeScaling::Dynamic {
            factor,
            original: f64::from(original),
            context: context as f64,
        },
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => reference::RopeScaling::Yarn {
            factor,
            original: f64::from(original),
            fast: beta_fast,
            slow: beta_slow,
            truncate,
        },
        RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        } => reference::RopeScaling::Llama3 {
            factor,
            low,
            high,
            original: f64::from(original),
        },
    }
}

/// How the oracle turns heads in a context of that length.
pub fn rope_of(rope: &Rope, context: usize) -> reference::Rope {
    let scaling = scaling_of(&rope.scaling, context);
    let mut frequencies = rope_frequencies(rope.columns as usize, rope.base, scaling);
    if let RopeScaling::Factors(factors) = &rope.scaling {
        let pairs = frequencies.iter_mut().zip(factors);
        pairs.for_each(|(frequency, factor)| *frequency /= factor);
    }
    reference::Rope {
        frequencies,
        neighbours: rope.pairs == Pairs::Neighbours,
        attention_factor: match rope.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        },
    }
}

/// Makes weights: each goes to the file under its name and to the oracle.
struct Maker {
    random: Random,
    storage: DType,
    file: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Maker {
    /// Numbers around `middle`, as they are stored: matrices as `storage`, the rest as f32.
    fn values(&mut self, name: &str, shape: &[usize], middle: f64, spread: f64) -> Vec<f64> {
        let storage = match shape.len() == 2 {
            true => self.storage,
            false => DType::F32,
        };
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| round_to(storage.name(), middle + spread * self.random.float()))
            .collect();
        let floats = values.iter().map(|&x| x as f32).collect();
        self.file.insert(name.to_string(), (shape.to_vec(), floats));
        values
    }

    /// A dense layer that keeps the magnitude of what goes through.
    fn linear(&mut self, name: &str, from: u32, to: u32, biased: bool) -> reference::Linear {
        let (n_in, n_out) = (from as usize, to as usize);
        let spread = (3.0 / n_in as f64).sqrt();
        reference::Linear {
            n_in,
            weight: self.values(&format!("{name}.weight"), &[n_out, n_in], 0.0, spread),
            bias: biased.then(|| self.values(&format!("{name}.bias"), &[n_out], 0.0, 0.3)),
        }
    }

    fn norm(&mut self, name: &str, n: u32) -> Vec<f64> {
        self.values(&format!("{name}.weight"), &[n as usize], 1.0, 0.3)
    }

    fn layer(&mut self, spec: &CausalSpec, ix: usize) -> reference::CausalLayer {
        let name = |part: &str| format!("model.layers.{ix}.{part}");
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = spec.heads;
        let (d, queries, keys) = (spec.width, heads * head_dim, kv_heads * head_dim);
        let (qkv_bias, ffn_bias) = (spec.qkv_bias, spec.ffn_bias);
        reference::CausalLayer {
            attention_norm: self.norm(&name("input_layernorm"), d),
            q: self.linear(&name("self_attn.q_proj"), d, queries, qkv_bias),
            k: self.linear(&name("self_attn.k_proj"), d, keys, qkv_bias),
            v: self.linear(&name("self_attn.v_proj"), d, keys, qkv_bias),
            o: self.linear(&name("self_attn.o_proj"), queries, d, spec.out_bias),
            qk_norm: spec.qk_norm.then(|| {
                ["self_attn.q_norm", "self_attn.k_norm"]
                    .map(|part| self.norm(&name(part), head_dim))
            }),
            window: spec.windows[ix].map(|keys| keys as usize),
            feed_forward_norm: self.norm(&name("post_attention_layernorm"), d),
            gate: self.linear(&name("mlp.gate_proj"), d, spec.ffn, ffn_bias),
            up: self.linear(&name("mlp.up_proj"), d, spec.ffn, ffn_bias),
            activation: match spec.activation {
                Activation::Relu => reference::Activation::Relu,
                Activation::Gelu => reference::Activation::Gelu,
                Activation::GeluTanh => reference::Activation::GeluTanh,
                Activation::Silu => reference::Activation::Silu,
            },
            down: self.linear(&name("mlp.down_proj"), spec.ffn, d, ffn_bias),
        }
    }

    fn stack(&mut self, spec: &CausalSpec) -> reference::CausalStack {
        let d = spec.width as usize;
        let table = [spec.vocab as usize, d];
        reference::CausalStack {
            d_model: d,
            heads: spec.heads.heads as usize,
            kv_heads: spec.heads.kv_heads as usize,
            eps: f64::from(spec.norm_eps),
            rope: rope_of(&spec.rope, 0),
            embedding: self.values("model.embed_tokens.weight", &table, 0.0, 1.0),
            layers: (0..spec.layers as usize)
                .map(|ix| self.layer(spec, ix))
                .collect(),
            norm: self.norm("model.norm", spec.width),
            output: (!spec.tied_logits).then(|| self.values("lm_head.weight", &table, 0.0, 1.0)),
        }
    }
}

/// A model on the device and the oracle of the same weights, whose rope is that of short contexts.
pub fn make(gpu: &Gpu, spec: &CausalSpec, dtype: DType) -> (CausalModel, reference::CausalStack) {
    let mut maker = Maker {
        random: Random::new(u64::from(spec.width)),
        storage: dtype,
        file: BTreeMap::new(),
    };
    let oracle = maker.stack(spec);
    let views = maker.file.iter().map(|(name, (shape, values))| {
        let bytes = bytemuck::cast_slice(values);
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (name, view.unwrap())
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let source = Source::Directory(dir.path().to_owned());
    let model = CausalModel::load_spec(gpu, &source, spec, dtype, &mut |_, _| {}).unwrap();
    (model, oracle)
}

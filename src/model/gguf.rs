//! What a GGUF file says of a decoder-only model, and its matrices on the device. Only data: which
//! architectures are known, what their metadata and tensors are called, and in which blocks weights lie.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::causal::{CausalNames, MAX_POSITIONS};
use super::reader::{binds, dense, ordered};
use super::{CausalSpec, Rope, RopeScaling, yarn_attention_factor};
use crate::gguf::{Blocks, Gguf, Header};
use crate::gpu::{DType, Gpu};
use crate::layers::Heads;
use crate::ops::{Activation, Matrix, Pairs, Storage};
use crate::{Error, Result};

/// A decoder-only model of the Llama family as a GGUF file describes it: RMSNorm before each block and at the
/// end, rotary positions, grouped heads, a feed-forward gated by SiLU.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// Columns of the residual stream, d.
    pub width: u32,
    /// Tokens, V: rows of the embedding table.
    pub vocab: u32,
    /// Layers.
    pub layers: u32,
    /// Query heads, H.
    pub heads: u32,
    /// KV heads, Hk.
    pub kv_heads: u32,
    /// Columns of a head, D.
    pub head_dim: u32,
    /// The inner width of the feed-forward blocks.
    pub ffn: u32,
    /// Added to mean squares.
    pub norm_eps: f32,
    /// Whether each head of queries and keys has an RMSNorm.
    pub qk_norm: bool,
    /// Whether the projections of queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether attention's output projection has one.
    pub out_bias: bool,
    /// The keys that a token sees, its own included; all before it if not given.
    pub window: Option<u32>,
    /// The longest context.
    pub max_positions: u32,
    /// Pair i of n turns by base^(-i / n) radians a position.
    pub rope_base: f32,
    /// Columns of a head that turn, the first ones.
    pub rope_columns: u32,
    /// Whether pairs are neighbours, columns 2 i and 2 i + 1, as llama.cpp's `llama` files have them: rows of
    /// Q and K were sorted so. Else column i turns with column i + columns / 2.
    pub rope_neighbours: bool,
    /// How frequencies are stretched.
    pub rope_scaling: OutlineScaling,
    /// The logits' matrix is the embeddings.
    pub tied_logits: bool,
}

/// How a GGUF file stretches rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OutlineScaling {
    /// Not at all.
    None,
    /// Every frequency over `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// YaRN with llama.cpp's defaults: betas 32 and 1, sines and cosines times 1 + 0.1 ln factor.
    Yarn {
        /// At least 1.
        factor: f32,
        /// The longest context trained on.
        original: u32,
    },
    /// Pair i's frequency over element i of the tensor `rope_freqs.weight` (f32 `[columns / 2]`), by which
    /// files of Llama 3.1 and later carry their scaling.
    Factors,
}

impl Outline {
    /// Reads the metadata and checks that the file has the tensors they ask for, in their shapes, and no
    /// others.
    ///
    /// # Errors
    /// [`Error::File`] for an architecture that is not known, a key or tensor that is missing or
    /// contradicts another, and for what is asked for and not honoured.
    pub fn new(header: &Header) -> Result<Outline> {
        let architecture = header.text("general.architecture")?.unwrap_or("absent");
        if !["llama", "qwen2", "qwen3"].contains(&architecture) {
            return Err(header.error(format_args!(
                "general.architecture is {architecture}; llama (Mistral and SmolLM2 too), qwen2 and qwen3 are known"
            )));
        }
        let key = |name: &str| format!("{architecture}.{name}");
        let find = |name: &str| header.u32(&key(name));
        let must = |name: &str| match find(name)? {
            None | Some(0) => Err(header.error(format_args!("{} is absent or 0", key(name)))),
            Some(n) => Ok(n),
        };
        for name in ["expert_count", "expert_used_count"] {
            if find(name)?.is_some_and(|n| n > 0) {
                let what = format_args!("{} is above 0; models of experts are not run", key(name));
                return Err(header.error(what));
            }
        }
        if header.flag(&key("attention.causal"))? == Some(false) {
            let key = key("attention.causal");
            return Err(header.error(format_args!("{key} is false; decoders look back only")));
        }
        let (width, heads) = (must("embedding_length")?, must("attention.head_count")?);
        let head_dim = match find("attention.key_length")? {
            Some(n) => n,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                let what = format_args!("{heads} heads do not divide the width, {width}");
                return Err(header.error(what));
            }
        };
        let value_dim = find("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            let what = format_args!("heads of {head_dim} columns have values of {value_dim}");
            return Err(header.error(what));
        }
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let norm_eps = header.f32(&eps_key)?;
        let has = |name: &str| header.tensors.contains_key(name);
        let embedding = header.tensors.get("token_embd.weight");
        let embedding =
            embedding.ok_or_else(|| header.error("it has no tensor token_embd.weight"))?;
        let outline = Outline {
            width,
            vocab: embedding.shape[0],
            layers: must("block_count")?,
            heads,
            kv_heads: find("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ffn: must("feed_forward_length")?,
            norm_eps: norm_eps.ok_or_else(|| header.error(format_args!("it has no {eps_key}")))?,
            qk_norm: architecture == "qwen3",
            qkv_bias: architecture == "qwen2" || has("blk.0.attn_q.bias"),
            out_bias: has("blk.0.attn_output.bias"),
            window: find("attention.sliding_window")?.filter(|&n| n > 0),
            max_positions: must("context_length")?,
            rope_base: header.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_columns: find("rope.dimension_count")?.unwrap_or(head_dim),
            rope_neighbours: architecture == "llama",
            rope_scaling: scaling(header, &key, has("rope_freqs.weight"))?,
            tied_logits: !has("output.weight"),
        };
        outline.check(header)?;
        Ok(outline)
    }

    /// The model that this describes.
    ///
    /// # Errors
    /// [`Error::File`] for frequencies' factors that are missing or not finite.
    pub fn spec(&self, gguf: &Gguf) -> Result<CausalSpec> {
        let scaling = match self.rope_scaling {
            OutlineScaling::None => RopeScaling::None,
            OutlineScaling::Linear { factor } => RopeScaling::Linear {
                factor: factor.into(),
            },
            OutlineScaling::Yarn { factor, original } => RopeScaling::Yarn {
                factor: factor.into(),
                original,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
                attention_factor: yarn_attention_factor(factor.into(), 1.0),
            },
            OutlineScaling::Factors => {
                let factors = gguf.floats("rope_freqs.weight", &[self.rope_columns / 2])?;
                RopeScaling::Factors(factors.into_iter().map(f64::from).collect())
            }
        };
        Ok(CausalSpec {
            width: self.width,
            vocab: self.vocab,
            layers: self.layers,
            heads: Heads {
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
            },
            ffn: self.ffn,
            activation: Activation::Silu,
            norm_eps: self.norm_eps,
            qk_norm: self.qk_norm,
            qkv_bias: self.qkv_bias,
            out_bias: self.out_bias,
            ffn_bias: false,
            windows: vec![self.window; self.layers as usize],
            rope: Rope {
                base: self.rope_base.into(),
                columns: self.rope_columns,
                pairs: match self.rope_neighbours {
                    true => Pairs::Neighbours,
                    false => Pairs::Halves,
                },
                scaling,
            },
            max_positions: self.max_positions.min(MAX_POSITIONS),
            tied_logits: self.tied_logits,
        })
    }

    fn check(&self, header: &Header) -> Result<()> {
        // As long as a file's name list at most: what is asked for is counted before it is listed.
        if self.layers as usize > header.tensors.len() {
            let n = header.tensors.len();
            let what = format_args!("{} layers with {n} tensors", self.layers);
            return Err(header.error(what));
        }
        let wanted = self.tensors();
        for (name, shape) in &wanted {
            match header.tensors.get(name) {
                None => return Err(header.error(format_args!("it has no tensor {name}"))),
                Some(info) if info.shape != *shape => {
                    let is = &info.shape;
                    return Err(header.error(format_args!(
                        "{name} has the shape {is:?}; the metadata ask for {shape:?}"
                    )));
                }
                Some(_) => {}
            }
        }
        match header
            .tensors
            .keys()
            .find(|name| !wanted.contains_key(*name))
        {
            None => Ok(()),
            Some(name) => Err(header.error(format_args!(
                "the tensor {name} has no place in the model that the metadata describe"
            ))),
        }
    }

    /// The tensors of such a model and their shapes, outermost extent first.
    pub fn tensors(&self) -> BTreeMap<String, Vec<u32>> {
        let (d, ffn) = (self.width, self.ffn);
        // A product too large for any file is found wrong when shapes are compared.
        let q = self.heads.saturating_mul(self.head_dim);
        let kv = self.kv_heads.saturating_mul(self.head_dim);
        let mut all = BTreeMap::new();
        let mut put = |name: String, shape: &[u32]| {
            all.insert(name, shape.to_vec());
        };
        put("token_embd.weight".into(), &[self.vocab, d]);
        put("output_norm.weight".into(), &[d]);
        if !self.tied_logits {
            put("output.weight".into(), &[self.vocab, d]);
        }
        if self.rope_scaling == OutlineScaling::Factors {
            put("rope_freqs.weight".into(), &[self.rope_columns / 2]);
        }
        for layer in 0..self.layers {
            let mut put = |name: &str, shape: &[u32]| put(format!("blk.{layer}.{name}"), shape);
            for (name, n, k, biased) in [
                ("attn_q", q, d, self.qkv_bias),
                ("attn_k", kv, d, self.qkv_bias),
                ("attn_v", kv, d, self.qkv_bias),
                ("attn_output", d, q, self.out_bias),
                ("ffn_gate", ffn, d, false),
                ("ffn_up", ffn, d, false),
                ("ffn_down", d, ffn, false),
            ] {
                put(&format!("{name}.weight"), &[n, k]);
                if biased {
                    put(&format!("{name}.bias"), &[n]);
                }
            }
            for name in ["attn_norm.weight", "ffn_norm.weight"] {
                put(name, &[d]);
            }
            if self.qk_norm {
                for name in ["attn_q_norm.weight", "attn_k_norm.weight"] {
                    put(name, &[self.head_dim]);
                }
            }
        }
        all
    }
}

fn scaling(header: &Header, key: &dyn Fn(&str) -> String, factors: bool) -> Result<OutlineScaling> {
    // As llama.cpp reads them: a factor alone is linear, and it has an older name.
    let (factor_key, older) = (key("rope.scaling.factor"), key("rope.scale_linear"));
    let stated = match header.f32(&factor_key)? {
        None => header.f32(&older)?.map(|factor| (factor, older)),
        Some(factor) => Some((factor, factor_key.clone())),
    };
    // It takes 0 for no factor.
    let stated = stated.filter(|&(factor, _)| factor != 0.0);
    let scaled = stated.as_ref().is_some_and(|&(factor, _)| factor != 1.0);
    let kind = header.text(&key("rope.scaling.type"))?;
    let kind = kind.unwrap_or(if scaled { "linear" } else { "none" });
    // llama.cpp's defaults are what YaRN is read with.
    for (name, default) in [
        ("attn_factor", 1.0),
        ("yarn_ext_factor", 1.0),
        ("yarn_attn_factor", 1.0),
        ("yarn_beta_fast", 32.0),
        ("yarn_beta_slow", 1.0),
        ("yarn_log_multiplier", 0.0),
    ] {
        let key = key(&format!("rope.scaling.{name}"));
        if let Some(value) = header.f32(&key)?.filter(|&value| value != default) {
            let what = format_args!("{key} is {value}; {default} is what can be honoured");
            return Err(header.error(what));
        }
    }
    let factor = || match &stated {
        Some((factor, _)) if *factor >= 1.0 => Ok(*factor),
        Some((factor, key)) => {
            Err(header.error(format_args!("{key} is {factor}; 1 or more is wanted")))
        }
        None => Err(header.error(format_args!("{factor_key} is absent; 1 or more is wanted"))),
    };
    let scaling = match kind {
        "none" => OutlineScaling::None,
        "linear" => OutlineScaling::Linear { factor: factor()? },
        "yarn" => {
            let key = key("rope.scaling.original_context_length");
            let original = header.u32(&key)?;
            OutlineScaling::Yarn {
                factor: factor()?,
                original: original.ok_or_else(|| header.error(format_args!("it has no {key}")))?,
            }
        }
        other => {
            let what =
                format_args!("rope.scaling.type is {other}; none, linear and yarn are known");
            return Err(header.error(what));
        }
    };
    match (factors, scaling) {
        (false, scaling) => Ok(scaling),
        (true, OutlineScaling::None) => Ok(OutlineScaling::Factors),
        (true, other) => Err(header.error(format_args!("rope_freqs.weight beside {other:?}"))),
    }
}

/// How several matrices become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// All columns of the first, then those of the next.
    SideBySide,
    /// The first column of each, then the second of each: a gate's beside what it lets through.
    InTurns,
}

/// Tensors of one file, each `[N, K]`, as one matrix W `[K, sum of N]`.
///
/// Tensors that are all Q8_0, all Q4_0 or all Q4_1 stay in their blocks, and so does Q5_0, as Q8_0: its integers
/// and scales are kept as they are. Q4_K, Q6_K and tensors of different types beside each other are expanded to
/// f16 where the device has f16 and every weight fits, else to f32. F16 stays f16 where the device has it; F32
/// and BF16 become `floats`.
///
/// # Errors
/// [`Error::File`] for tensors that are missing, of another shape, or not finite; [`Error::Refused`] for
/// matrices of different N in turns.
pub fn matrix(
    gpu: &Gpu,
    gguf: &Gguf,
    names: &[(String, u32)],
    k: u32,
    columns: Columns,
    floats: DType,
) -> Result<Matrix> {
    let mut parts = Vec::new();
    for (name, n) in names {
        let (info, bytes) = gguf.tensor(name)?;
        if info.shape != [*n, k] {
            let is = &info.shape;
            let what = format_args!("{name} has the shape {is:?}; [{n}, {k}] is wanted");
            return Err(gguf.error(what));
        }
        parts.push((info.blocks, bytes, *n as usize));
    }
    let &(first, _, n) = parts
        .first()
        .ok_or_else(|| Error::refused("the parts of a matrix", 0, "one at least"))?;
    if columns == Columns::InTurns && parts.iter().any(|part| part.2 != n) {
        let label = names[0].0.as_str();
        return Err(Error::refused(
            label,
            n,
            "as many rows as those it takes turns with",
        ));
    }
    let label = &names[0].0;
    let storage = match first {
        _ if parts.iter().any(|part| part.0 != first) => None,
        Blocks::Q8_0 | Blocks::Q5_0 => Some(Storage::Q8_0),
        Blocks::Q4_0 => Some(Storage::Q4_0),
        Blocks::Q4_1 => Some(Storage::Q4_1),
        _ => None,
    };
    if let Some(storage) = storage {
        let parts: Vec<(Cow<[u8]>, usize)> = parts
            .into_iter()
            .map(|(blocks, bytes, n)| match blocks {
                Blocks::Q5_0 => (Cow::Owned(crate::gguf::q5_0_as_q8_0(bytes)), n),
                _ => (Cow::Borrowed(bytes), n),
            })
            .collect();
        // Scales are bound apart.
        let quants = match storage {
            Storage::Q8_0 => 32,
            _ => 16,
        };
        let rows: usize = parts.iter().map(|(_, n)| n).sum();
        let blocks = u64::from(k / 32) * rows.next_multiple_of(4) as u64;
        binds(gpu, label, blocks * quants)?;
        let rows: Vec<Vec<&[u8]>> = parts
            .iter()
            .map(|(bytes, n)| bytes.chunks_exact(bytes.len() / n).collect())
            .collect();
        return Matrix::blocks(gpu, label, storage, k, &ordered(rows, columns))
            .map_err(|e| gguf.error(e));
    }

    let float = |blocks: Blocks| matches!(blocks, Blocks::F32 | Blocks::BF16);
    let mut dtype = match parts.iter().all(|part| float(part.0)) {
        true => floats,
        false if gpu.caps().f16 => DType::F16,
        false => DType::F32,
    };
    let mut values = Vec::new();
    for (name, n) in names {
        values.push(gguf.floats(name, &[*n, k])?);
    }
    let fits = |&x: &f32| x.abs() <= half::f16::MAX.to_f32();
    if dtype == DType::F16 && !values.iter().flatten().all(fits) {
        dtype = DType::F32;
    }
    dense(gpu, label, dtype, &values, k, columns)
}

/// What tensors are called.
pub(super) const NAMES: CausalNames = CausalNames {
    embedding: "token_embd.weight",
    layer: "blk",
    attention_norm: "attn_norm",
    projections: ["attn_q", "attn_k", "attn_v", "attn_output"],
    qk_norms: ["attn_q_norm", "attn_k_norm"],
    feed_forward_norm: "ffn_norm",
    gate: "ffn_gate",
    up: "ffn_up",
    down: "ffn_down",
    norm: "output_norm",
    logits: "output.weight",
    frequencies: "rope_freqs",
};

//! Models from data: every way in which encoder-decoder families differ is in [`Spec`], decoder-only ones in
//! [`CausalSpec`].

mod causal;
mod files;
mod gguf;
mod llama;
mod load;
mod marian;
mod paged;
mod reader;
mod rope;
mod weights;

pub use causal::{CausalForward, CausalModel, CausalSpec, Chunk, Wanted};
pub use files::Source;
pub use gguf::{Columns, Outline, OutlineScaling, matrix};
pub use paged::PagedStep;
pub use rope::{Rope, RopeScaling, yarn_attention_factor};
#[cfg(fuzzing)]
pub use weights::fuzz_safetensors;

use std::path::Path;

use crate::gpu::{DType, Gpu, Recorder, Tensor};
use crate::layers::{Batch, DecoderLayer, EncoderLayer, NormOrder, Past, Stream};
use crate::ops::{self, Activation, Embedding, Epilogue, Linear, Norm, Places};
use crate::{Error, Result, layers};

/// The shape of one stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Layers.
    pub layers: u32,
    /// Heads, H; the width is H times D.
    pub heads: u32,
    /// The wide space of the feed-forward layers.
    pub ffn: u32,
}

/// Where positions come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Sines, then cosines, made here. (Vaswani et al. 2017, halves as in Marian)
    Sinusoidal,
    /// A table among the weights, whose row `first` is position 0.
    Learned {
        /// Rows before position 0.
        first: u32,
    },
}

/// Everything in which encoder-decoder families differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Columns of the residual stream, d.
    pub width: u32,
    /// Source tokens.
    pub source_vocab: u32,
    /// Target tokens, V.
    pub target_vocab: u32,
    /// The encoder.
    pub encoder: Stack,
    /// The decoder.
    pub decoder: Stack,
    /// Of the feed-forward layers.
    pub activation: Activation,
    /// Where the norms stand.
    pub order: NormOrder,
    /// A norm at the end of each stack.
    pub final_norm: bool,
    /// Added to variances.
    pub norm_eps: f32,
    /// The embeddings' factor.
    pub embed_scale: f32,
    /// Where positions come from.
    pub positions: Positions,
    /// The longest sequence.
    pub max_positions: u32,
    /// Source and target embeddings are one matrix, if `tied_logits` is set too; else each is its own
    /// where the weights have it.
    pub shared_embeddings: bool,
    /// The logits' matrix is the target's embeddings.
    pub tied_logits: bool,
    /// Whether the logits have a bias.
    pub logits_bias: bool,
}

impl Spec {
    fn check(&self) -> Result<()> {
        for (name, stack) in [("encoder", self.encoder), ("decoder", self.decoder)] {
            let refuse = |what: &str, value: u32, bound: String| {
                Err(Error::refused(format!("the {name}'s {what}"), value, bound))
            };
            if stack.layers == 0 || stack.layers > 1024 {
                return refuse("layers", stack.layers, "1 to 1024".into());
            }
            if stack.heads == 0 || !self.width.is_multiple_of(stack.heads) {
                return refuse(
                    "heads",
                    stack.heads,
                    format!("they must divide the width, {}", self.width),
                );
            }
            if self.width / stack.heads > crate::attention::MAX_HEAD_DIM {
                let bound = format!("at most {} columns a head", crate::attention::MAX_HEAD_DIM);
                return refuse("heads", stack.heads, bound);
            }
            if stack.ffn == 0 || stack.ffn > 1 << 20 {
                return refuse("feed-forward width", stack.ffn, "1 to 1048576".into());
            }
        }
        for (name, value, most) in [
            ("the width", self.width, 1 << 16),
            ("the source vocabulary", self.source_vocab, 1 << 24),
            ("the target vocabulary", self.target_vocab, 1 << 24),
            ("the number of positions", self.max_positions, 1 << 20),
        ] {
            if value == 0 || value > most {
                return Err(Error::refused(name, value, format!("1 to {most}")));
            }
        }
        Ok(())
    }
}

/// What a family calls its tensors. Layers are numbered behind their prefix.
struct Names {
    shared_embedding: &'static str,
    source_embedding: &'static str,
    target_embedding: &'static str,
    source_positions: &'static str,
    target_positions: &'static str,
    logits: &'static str,
    logits_bias: &'static str,
    encoder_norm: &'static str,
    decoder_norm: &'static str,
    encoder_layer: &'static str,
    decoder_layer: &'static str,
    self_attention: &'static str,
    cross_attention: &'static str,
    /// Queries, keys, values, output.
    projections: [&'static str; 4],
    self_norm: &'static str,
    cross_norm: &'static str,
    up: &'static str,
    down: &'static str,
    feed_forward_norm: &'static str,
}

/// A model on the device.
pub struct Model {
    gpu: Gpu,
    spec: Spec,
    dtype: DType,
    source: Embedding,
    encoder: Vec<EncoderLayer>,
    encoder_norm: Option<Norm>,
    target: Embedding,
    decoder: Vec<DecoderLayer>,
    decoder_norm: Option<Norm>,
    logits: Linear,
}

/// A model of either kind.
pub enum AnyModel {
    /// Reads a source, then writes a target.
    EncoderDecoder(Box<Model>),
    /// Goes on with a text.
    Causal(Box<CausalModel>),
}

impl AnyModel {
    /// Loads whatever the source's `config.json` says it is; GGUF files are decoder-only models.
    ///
    /// # Errors
    /// As [`Model::load`] and [`CausalModel::load`]; [`Error::Refused`] for a family that is not known.
    pub fn load(
        gpu: &Gpu,
        source: &Source,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<AnyModel> {
        if let Source::Gguf(_) = source {
            let model = CausalModel::load(gpu, source, dtype, progress)?;
            return Ok(AnyModel::Causal(Box::new(model)));
        }
        let config = source.json("config.json")?;
        let family = config.get("model_type").and_then(|family| family.as_str());
        Ok(match family {
            Some("marian") => {
                AnyModel::EncoderDecoder(Box::new(Model::load(gpu, source, dtype, progress)?))
            }
            Some(family) if llama::FAMILIES.contains(&family) => {
                AnyModel::Causal(Box::new(CausalModel::load(gpu, source, dtype, progress)?))
            }
            other => {
                let path = source.path().join("config.json");
                return Err(Error::refused(
                    format!("model_type in {}", path.display()),
                    other.unwrap_or("absent"),
                    format!("marian and {} are known", llama::FAMILIES.join(", ")),
                ));
            }
        })
    }
}

/// The activation that a config calls `name`, under `key`.
fn activation(path: &Path, key: &str, name: &str) -> Result<Activation> {
    Ok(match name {
        "relu" => Activation::Relu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "swish" | "silu" => Activation::Silu,
        other => {
            return Err(Error::refused(
                format!("{key} in {}", path.display()),
                other,
                "relu, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, swish and silu are known",
            ));
        }
    })
}

/// A batch of token sequences in rows of one length. What stands behind a row's own tokens is computed
/// like any other token, and never attended to by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padded {
    /// `[B, L]`
    pub ids: Vec<u32>,
    /// Tokens of each row. `[B]`
    pub lengths: Vec<u32>,
    /// Length of a row, L.
    pub len: u32,
}

impl Padded {
    /// Rows of any length, padded to the longest with `pad`.
    pub fn new<R: AsRef<[u32]>>(rows: &[R], pad: u32) -> Self {
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        let len = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let padding = |row: &[u32]| std::iter::repeat_n(pad, len - row.len());
        Padded {
            ids: rows
                .iter()
                .flat_map(|row| row.iter().copied().chain(padding(row)))
                .collect(),
            lengths: rows.iter().map(|row| row.len() as u32).collect(),
            len: len as u32,
        }
    }

    /// Checked, and on the device: ids u32 `[B L]`, lengths u32 `[B]`. `what` names them in errors.
    fn upload(
        &self,
        gpu: &Gpu,
        what: &str,
        vocab: u32,
        positions: u32,
    ) -> Result<(Tensor, Tensor)> {
        let refuse =
            |value: String, bound: String| Err(Error::refused(what.to_string(), value, bound));
        if self.lengths.is_empty() || self.ids.len() != self.lengths.len() * self.len as usize {
            let (n, rows, len) = (self.ids.len(), self.lengths.len(), self.len);
            return refuse(
                format!("{n} tokens in {rows} rows of {len}"),
                "whole rows, one at least".into(),
            );
        }
        if let Some(row) = self.lengths.iter().position(|&n| n == 0 || n > self.len) {
            return refuse(
                format!("{} tokens in row {row}", self.lengths[row]),
                format!("1 to {}", self.len),
            );
        }
        if self.len > positions {
            return refuse(
                format!("{} tokens long", self.len),
                format!("the model has {positions} positions"),
            );
        }
        if let Some(id) = self.ids.iter().find(|&&id| id >= vocab) {
            return refuse(
                format!("token {id}"),
                format!("the vocabulary has {vocab} tokens"),
            );
        }
        Ok((
            gpu.upload_u32(what, &[self.ids.len() as u32], &self.ids)?,
            gpu.upload_u32("lengths", &[self.lengths.len() as u32], &self.lengths)?,
        ))
    }
}

/// What the encoder made of a batch of sources: the decoder's long-term memory.
pub struct Memory {
    /// The encoder's output. `[B, S, d]`
    pub states: Tensor,
    /// Keys and values of every decoder layer, made once. `[B S, 2 d]`
    pub cross: Vec<Tensor>,
    /// Valid positions of each source. u32 `[B]`
    pub lengths: Tensor,
    /// Sources, B.
    pub sources: u32,
    /// Positions of the longest, S.
    pub len: u32,
    /// The attention weights of every layer, where asked for. f32 `[B, H, S, S]`
    pub attentions: Vec<Tensor>,
}

/// What the decoder says of whole targets.
pub struct Forward {
    /// Scores of every token at every position. f32 `[B, T, V]`
    pub logits: Tensor,
    /// Self-attention's weights by layer, where asked for. f32 `[B, H, T, T]`
    pub decoder_attentions: Vec<Tensor>,
    /// Cross-attention's weights by layer, where asked for. f32 `[B, H, T, S]`
    pub cross_attentions: Vec<Tensor>,
}

impl Model {
    /// The device that the model is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What the model is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// How weights and activations are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn upload(&self, what: &str, tokens: &Padded, vocab: u32) -> Result<(Tensor, Tensor)> {
        tokens.upload(&self.gpu, what, vocab, self.spec.max_positions)
    }

    /// One encoder step: the whole of every source at once, and the keys and values that the decoder's
    /// cross-attention will read. Records, submits, and does not wait.
    ///
    /// # Errors
    /// [`Error::Refused`] for empty or too long sources and for ids outside the vocabulary.
    pub fn encode(&self, sources: &Padded, with_attentions: bool) -> Result<Memory> {
        let (ids, lengths) = self.upload("input_ids", sources, self.spec.source_vocab)?;
        let (n, len) = (sources.lengths.len() as u32, sources.len);
        let heads = self.spec.encoder.heads;
        let mut recorder = Recorder::new(&self.gpu);
        let batch = self.batch(n, len, heads);
        let mut stream = Stream::new(
            &mut recorder,
            self.dtype,
            batch,
            self.spec.order,
            self.spec.encoder.ffn,
        )?;
        let x = stream.state().clone();
        ops::embed(
            stream.recorder(),
            &ids,
            &self.source,
            Places::Sequence(len),
            &x,
        )?;
        let mut attentions = Vec::new();
        for layer in &self.encoder {
            let tap = self.tap(with_attentions, [n, heads, len, len], &mut attentions)?;
            stream.encoder_layer(layer, &lengths, tap.as_ref())?;
        }
        if let Some(norm) = &self.encoder_norm {
            stream.norm(norm)?;
        }
        let states = stream.state().reshape_prefix(&[n, len, self.spec.width]);
        let mut cross = Vec::new();
        for layer in &self.decoder {
            let kv = self
                .gpu
                .empty("cross k v", self.dtype, &[n * len, 2 * self.spec.width])?;
            ops::matmul(
                &mut recorder,
                &states,
                &layer.cross.kv,
                &kv,
                Epilogue::default(),
            )?;
            cross.push(kv);
        }
        self.gpu.submit(&recorder.finish()?)?;
        Ok(Memory {
            states,
            cross,
            lengths,
            sources: n,
            len,
            attentions,
        })
    }

    /// The decoder over whole targets at once, causally: every position's logits.
    ///
    /// # Errors
    /// [`Error::Refused`] for empty or too long targets, ids outside the vocabulary, and a number of
    /// targets that is not the memory's number of sources.
    pub fn forward(
        &self,
        memory: &Memory,
        targets: &Padded,
        with_attentions: bool,
    ) -> Result<Forward> {
        let rows = targets.lengths.len();
        if rows != memory.sources as usize {
            let bound = format!("{} rows, as the sources", memory.sources);
            return Err(Error::refused(
                "decoder_input_ids",
                format_args!("{rows} rows"),
                bound,
            ));
        }
        let (ids, _) = self.upload("decoder_input_ids", targets, self.spec.target_vocab)?;
        let len = targets.len;
        let (n, heads) = (memory.sources, self.spec.decoder.heads);
        let mut recorder = Recorder::new(&self.gpu);
        let batch = self.batch(n, len, heads);
        let mut stream = Stream::new(
            &mut recorder,
            self.dtype,
            batch,
            self.spec.order,
            self.spec.decoder.ffn,
        )?;
        let x = stream.state().clone();
        ops::embed(
            stream.recorder(),
            &ids,
            &self.target,
            Places::Sequence(len),
            &x,
        )?;
        let (mut decoder_attentions, mut cross_attentions) = (Vec::new(), Vec::new());
        for (ix, layer) in self.decoder.iter().enumerate() {
            let own = self.tap(
                with_attentions,
                [n, heads, len, len],
                &mut decoder_attentions,
            )?;
            let cross = self.tap(
                with_attentions,
                [n, heads, len, memory.len],
                &mut cross_attentions,
            )?;
            stream.decoder_layer(
                layer,
                Past::None,
                memory.layer(ix),
                [own.as_ref(), cross.as_ref()],
            )?;
        }
        if let Some(norm) = &self.decoder_norm {
            stream.norm(norm)?;
        }
        let states = stream.state().clone();
        let logits = self
            .gpu
            .empty("logits", DType::F32, &[n, len, self.spec.target_vocab])?;
        ops::matmul(
            &mut recorder,
            &states,
            &self.logits,
            &logits,
            Epilogue::default(),
        )?;
        self.gpu.submit(&recorder.finish()?)?;
        Ok(Forward {
            logits,
            decoder_attentions,
            cross_attentions,
        })
    }

    /// One decoder step for every sequence of the cache: its token in `ids`, u32 `[R]`, to `logits`, f32
    /// `[R, V]`. Several sequences may share a source.
    pub fn record_step(
        &self,
        recorder: &mut Recorder,
        memory: &Memory,
        cache: &crate::cache::Cache,
        ids: &Tensor,
        logits: &Tensor,
    ) -> Result<()> {
        let batch = self.batch(ids.shape[0], 1, self.spec.decoder.heads);
        let mut stream = Stream::new(
            recorder,
            self.dtype,
            batch,
            self.spec.order,
            self.spec.decoder.ffn,
        )?;
        let x = stream.state().clone();
        ops::embed(
            stream.recorder(),
            ids,
            &self.target,
            Places::Lengths(&cache.lengths),
            &x,
        )?;
        for (ix, layer) in self.decoder.iter().enumerate() {
            stream.decoder_layer(
                layer,
                Past::Cached(cache, ix),
                memory.layer(ix),
                [None, None],
            )?;
        }
        if let Some(norm) = &self.decoder_norm {
            stream.norm(norm)?;
        }
        let states = stream.state().clone();
        ops::matmul(recorder, &states, &self.logits, logits, Epilogue::default())
    }

    fn batch(&self, sequences: u32, len: u32, heads: u32) -> Batch {
        Batch {
            sequences,
            len,
            heads,
            head_dim: self.spec.width / heads,
        }
    }

    /// A tensor for a layer's attention weights, where they are wanted.
    fn tap(&self, wanted: bool, shape: [u32; 4], taps: &mut Vec<Tensor>) -> Result<Option<Tensor>> {
        if !wanted {
            return Ok(None);
        }
        let tensor = self.gpu.empty("attention weights", DType::F32, &shape)?;
        taps.push(tensor.clone());
        Ok(Some(tensor))
    }
}

impl Memory {
    fn layer(&self, ix: usize) -> layers::Source<'_> {
        layers::Source {
            kv: &self.cross[ix],
            lengths: &self.lengths,
            sequences: self.sources,
            len: self.len,
        }
    }
}

//! Decoder-only models from data: every way in which families differ is in [`CausalSpec`].

use super::load::check_dtype;
use super::reader::{Reader, Tensors};
use super::weights::Weights;
use super::{Columns, Outline, Padded, Rope, RopeScaling, Source, gguf, llama};
use crate::cache::{Cache, Extents};
use crate::gguf::Gguf;
use crate::gpu::{DType, Gpu, Recorder, Tensor};
use crate::layers::{CausalLayer, CausalStream, Heads, NewTokens, Paged};
use crate::ops::{self, Activation, Embedding, Linear, NOWHERE, Norm, Places, QkNorm, Rotary};
use crate::{Error, Result};

/// Everything in which decoder-only families differ. What they share: RMSNorm before each block and at the
/// end, rotary positions, causal attention, a gated feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalSpec {
    /// Columns of the residual stream, d.
    pub width: u32,
    /// Tokens, V.
    pub vocab: u32,
    /// Layers.
    pub layers: u32,
    /// Query heads, KV heads, and columns of each; H D need not be d.
    pub heads: Heads,
    /// The inner width of the feed-forward blocks.
    pub ffn: u32,
    /// Of the feed-forward blocks' gates.
    pub activation: Activation,
    /// Added to mean squares.
    pub norm_eps: f32,
    /// Whether each head of queries and keys has an RMSNorm.
    pub qk_norm: bool,
    /// Whether the projections of queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub out_bias: bool,
    /// Whether the feed-forward blocks' projections have a bias.
    pub ffn_bias: bool,
    /// For each layer, the keys that a token sees, its own included; all before it if not given.
    pub windows: Vec<Option<u32>>,
    /// How positions enter.
    pub rope: Rope,
    /// The longest context.
    pub max_positions: u32,
    /// The logits' matrix is the embeddings.
    pub tied_logits: bool,
}

impl CausalSpec {
    /// The longest text that steps over a cache write as transformers does: of [`CausalSpec::max_positions`], or where
    /// the rotary base grows with the context, only as long as it has not begun to.
    pub fn steady_positions(&self) -> u32 {
        match self.rope.scaling {
            RopeScaling::Dynamic { original, .. } => original.min(self.max_positions),
            _ => self.max_positions,
        }
    }

    fn check(&self) -> Result<()> {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        for (name, value, most) in [
            ("the width", self.width, 1 << 16),
            ("the vocabulary", self.vocab, 1 << 24),
            ("the number of layers", self.layers, MAX_LAYERS),
            ("the number of query heads", heads, 1 << 12),
            ("the number of KV heads", kv_heads, heads),
            ("the head dim", head_dim, crate::attention::MAX_HEAD_DIM),
            ("the feed-forward width", self.ffn, 1 << 20),
            ("the number of positions", self.max_positions, MAX_POSITIONS),
        ] {
            if value == 0 || value > most {
                return Err(Error::refused(name, value, format!("1 to {most}")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            let bound = format!("they must divide the {heads} query heads");
            return Err(Error::refused("the number of KV heads", kv_heads, bound));
        }
        if !(self.norm_eps >= 0.0 && self.norm_eps.is_finite()) {
            return Err(Error::refused("the norms' eps", self.norm_eps, "0 or more"));
        }
        if self.windows.len() != self.layers as usize {
            let bound = format!("one for each of {} layers", self.layers);
            return Err(Error::refused("windows", self.windows.len(), bound));
        }
        if self.windows.contains(&Some(0)) {
            return Err(Error::refused(
                "a window",
                0,
                "1 at least: the token itself",
            ));
        }
        self.rope.check(head_dim)
    }
}

/// More layers than any model has.
pub(super) const MAX_LAYERS: u32 = 1024;

/// Positions beyond it would lose their angle's last bits.
pub(super) const MAX_POSITIONS: u32 = 1 << 20;

/// What a family calls its tensors. Layers are numbered behind their prefix.
pub(super) struct CausalNames {
    pub embedding: &'static str,
    pub layer: &'static str,
    pub attention_norm: &'static str,
    /// Queries, keys, values, output.
    pub projections: [&'static str; 4],
    /// Of queries and of keys.
    pub qk_norms: [&'static str; 2],
    pub feed_forward_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub norm: &'static str,
    pub logits: &'static str,
    /// In every layer of old exports; computed here.
    pub frequencies: &'static str,
}

/// A decoder-only model on the device.
pub struct CausalModel {
    gpu: Gpu,
    spec: CausalSpec,
    dtype: DType,
    embedding: Embedding,
    layers: Vec<CausalLayer>,
    norm: Norm,
    logits: Linear,
    rotary: Rotary,
}

/// What a decoder-only model says of whole texts.
pub struct CausalForward {
    /// Scores of every token at every position. f32 `[B, T, V]`
    pub logits: Tensor,
    /// The attention weights by layer, where asked for. f32 `[B, H, T, T]`
    pub attentions: Vec<Tensor>,
}

/// Of which new tokens a step gives the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Of every row, padding too: `[S, T, V]`.
    All,
    /// Of each sequence's last: `[S, V]`.
    Last,
}

/// A step's new tokens, on the device.
pub struct Chunk {
    /// u32 `[S, T]`
    pub(super) ids: Tensor,
    /// The sequence and position of each row. u32 `[S T, 2]`
    pub(super) places: Option<Tensor>,
    /// The position of each sequence's first new token. i32 `[S]`
    pub(super) starts: Option<Tensor>,
    /// The rows whose logits are wanted, if not all. u32 `[S]`
    pub(super) rows: Option<Tensor>,
}

impl Chunk {
    /// One token a sequence, at its last position, `lengths - 1` of the cache: nothing of it changes from step
    /// to step but what lies in the tensors. ids: u32 `[S]`
    pub fn one(ids: &Tensor) -> Chunk {
        Chunk {
            ids: ids.reshape_prefix(&[ids.len() as u32, 1]),
            places: None,
            starts: None,
            rows: None,
        }
    }
}

impl CausalModel {
    /// Loads a model: `config.json` and the safetensors files of the source, or a GGUF file. `progress` hears
    /// of bytes taken and bytes in all. `dtype` stores weights and activations; softmax state and sums are f32.
    /// Of a GGUF file, matrices stay as [`super::matrix`] says.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is missing, damaged, or contradicts another one; [`Error::Refused`]
    /// for a model that no kernel can honour, and for settings that are not known.
    pub fn load(
        gpu: &Gpu,
        source: &Source,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CausalModel> {
        if let Source::Gguf(path) = source {
            return CausalModel::load_gguf(gpu, Gguf::open(path)?, dtype, progress);
        }
        let path = source.path().join("config.json");
        let spec = llama::spec(&path, &source.json("config.json")?)?;
        CausalModel::load_spec(gpu, source, &spec, dtype, progress)
    }

    /// As [`CausalModel::load`] of a GGUF file that is open.
    ///
    /// # Errors
    /// As [`CausalModel::load`].
    pub fn load_gguf(
        gpu: &Gpu,
        gguf: Gguf,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CausalModel> {
        check_dtype(gpu, dtype)?;
        let spec = Outline::new(gguf.header())?.spec(&gguf)?;
        spec.check()?;
        let tensors = Tensors::Gguf { gguf, taken: 0 };
        let reader = Reader {
            gpu,
            dtype,
            tensors,
            progress,
        };
        load(reader, &spec, &gguf::NAMES)
    }

    /// Loads the safetensors files of the source as what `spec` says, under Llama's names: for stacks that no
    /// config describes.
    ///
    /// # Errors
    /// As [`CausalModel::load`].
    pub fn load_spec(
        gpu: &Gpu,
        source: &Source,
        spec: &CausalSpec,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CausalModel> {
        check_dtype(gpu, dtype)?;
        spec.check()?;
        let reader = Reader {
            gpu,
            dtype,
            tensors: Tensors::Safetensors(Weights::load(source)?),
            progress,
        };
        load(reader, spec, &llama::NAMES)
    }

    /// The device that the model is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What the model is.
    pub fn spec(&self) -> &CausalSpec {
        &self.spec
    }

    /// How weights and activations are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// An empty cache for `sequences` of up to `capacity` positions; keys and values are stored as `types` says.
    ///
    /// # Errors
    /// [`Error::Refused`] for more positions than the model has, and for types that its heads do not fit;
    /// [`Error::OutOfMemory`] for more than fit.
    pub fn cache(&self, types: [DType; 2], sequences: u32, capacity: u32) -> Result<Cache> {
        let most = self.spec.max_positions;
        if capacity == 0 || capacity > most {
            let bound = format!("1 to the model's {most} positions");
            return Err(Error::refused("the cache's positions", capacity, bound));
        }
        if sequences == 0 {
            return Err(Error::refused("the cache's sequences", 0, "1 at least"));
        }
        let extents = Extents {
            layers: self.spec.layers,
            rows: sequences,
            kv_heads: self.spec.heads.kv_heads,
            capacity,
            head_dim: self.spec.heads.head_dim,
        };
        Cache::new(&self.gpu, types, extents, false)
    }

    /// New tokens of every sequence of a cache, that of row s from position `starts[s]` on; what stands
    /// behind a row's own tokens is written nowhere.
    ///
    /// # Errors
    /// [`Error::Refused`] for rows that are empty, reach past the model's positions, or are not as many as
    /// `starts`, and for ids outside the vocabulary.
    pub fn chunk(&self, tokens: &Padded, starts: &[u32], wanted: Wanted) -> Result<Chunk> {
        self.chunk_of(
            tokens,
            starts,
            wanted,
            |t, n| if t < n { t } else { NOWHERE },
        )
    }

    /// `place` says where column t of a row of n tokens stands, counted from the row's start.
    fn chunk_of(
        &self,
        tokens: &Padded,
        starts: &[u32],
        wanted: Wanted,
        place: impl Fn(u32, u32) -> u32,
    ) -> Result<Chunk> {
        let most = self.spec.max_positions;
        let (ids, _) = tokens.upload(&self.gpu, "input_ids", self.spec.vocab, most)?;
        let (n, len) = (tokens.lengths.len() as u32, tokens.len);
        if starts.len() != tokens.lengths.len() {
            let bound = format!("one for each of {n} rows");
            return Err(Error::refused("starts", starts.len(), bound));
        }
        let rows = starts.iter().zip(&tokens.lengths);
        let ends = rows
            .clone()
            .map(|(&from, &n)| u64::from(from) + u64::from(n));
        if let Some(end) = ends.into_iter().find(|&end| end > u64::from(most)) {
            let bound = format!("the model has {most} positions");
            return Err(Error::refused("a chunk's end", end, bound));
        }
        let places: Vec<u32> = rows
            .enumerate()
            .flat_map(|(s, (&from, &n))| {
                let place = &place;
                let position = move |t| match place(t, n) {
                    NOWHERE => NOWHERE,
                    at => from + at,
                };
                (0..len).flat_map(move |t| [s as u32, position(t)])
            })
            .collect();
        let last = tokens.lengths.iter().zip(0..).map(|(n, s)| s * len + n - 1);
        let gpu = &self.gpu;
        Ok(Chunk {
            ids: ids.reshape_prefix(&[n, len]),
            places: Some(gpu.upload_u32("places", &[n * len, 2], &places)?),
            starts: Some(gpu.upload("starts", DType::I32, &[n], bytemuck::cast_slice(starts))?),
            rows: match wanted {
                Wanted::All => None,
                Wanted::Last => {
                    Some(gpu.upload_u32("last rows", &[n], &last.collect::<Vec<u32>>())?)
                }
            },
        })
    }

    /// Whole texts at once: every position's logits. Padding attends to its row's own tokens, and nothing
    /// attends to it. Records, submits, and does not wait. The keys and values of a layer live only as long as
    /// it needs them.
    ///
    /// # Errors
    /// [`Error::Refused`] for empty or too long texts and for ids outside the vocabulary.
    pub fn forward(&self, tokens: &Padded, with_attentions: bool) -> Result<CausalForward> {
        let (gpu, spec) = (&self.gpu, &self.spec);
        let (n, len) = (tokens.lengths.len() as u32, tokens.len);
        // Here padding stands where it stands, so that its logits too are those of other implementations.
        let starts = vec![0; n as usize];
        let chunk = self.chunk_of(tokens, &starts, Wanted::All, |t, _| t)?;
        let lengths = gpu.upload_u32("lengths", &[n], &tokens.lengths)?;
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = spec.heads;
        let block = |name| gpu.empty(name, self.dtype, &[n, kv_heads, len, head_dim]);
        let (k, v) = (block("k")?, block("v")?);
        let logits = gpu.empty("logits", DType::F32, &[n, len, spec.vocab])?;
        let mut attentions = Vec::new();
        if with_attentions {
            for _ in 0..spec.layers {
                let shape = [n, heads, len, len];
                attentions.push(gpu.empty("attention weights", DType::F32, &shape)?);
            }
        }
        let mut recorder = Recorder::new(gpu);
        let pass = Pass {
            chunk: &chunk,
            lengths: &lengths,
            context: len,
            logits: &logits,
            attentions: &attentions,
            paged: None,
        };
        self.record(&mut recorder, pass, |_| [&k, &v])?;
        gpu.submit(&recorder.finish()?)?;
        Ok(CausalForward { logits, attentions })
    }

    /// One step for every sequence of the cache: appends the chunk's tokens, and writes the logits that it
    /// asks for, f32 `[S, T, V]` or `[S, V]`. The cache's lengths must count the new tokens already. Where the base of
    /// rotary positions grows with the context, it is that of the longest that the cache holds.
    ///
    /// # Errors
    /// [`Error::Refused`] for a cache of another shape, and for logits that do not hold what is written.
    pub fn record_step(
        &self,
        recorder: &mut Recorder,
        cache: &Cache,
        chunk: &Chunk,
        logits: &Tensor,
    ) -> Result<()> {
        let Heads {
            kv_heads, head_dim, ..
        } = self.spec.heads;
        let sequences = chunk.ids.shape[0];
        let shape = cache.k.first().map_or(&[][..], |k| &k.shape);
        let capacity = match shape {
            &[s, hk, l, d]
                if cache.k.len() == self.layers.len()
                    && [s, hk, d] == [sequences, kv_heads, head_dim] =>
            {
                l
            }
            shape => {
                let (layers, is) = (cache.k.len(), format!("{shape:?}"));
                let want = format!("[{sequences}, {kv_heads}, L, {head_dim}]");
                return Err(Error::refused(
                    "the cache",
                    format_args!("{layers} layers of {is}"),
                    format!("{} layers of {want}", self.layers.len()),
                ));
            }
        };
        let pass = Pass {
            chunk,
            lengths: &cache.lengths,
            context: capacity,
            logits,
            attentions: &[],
            paged: None,
        };
        self.record(recorder, pass, |ix| [&cache.k[ix], &cache.v[ix]])
    }

    /// `kv` gives the keys and values of each layer.
    pub(super) fn record<'a>(
        &self,
        recorder: &mut Recorder,
        pass: Pass<'a>,
        kv: impl Fn(usize) -> [&'a Tensor; 2],
    ) -> Result<()> {
        let spec = &self.spec;
        let longer = match spec.rope.grows_at(pass.context) {
            true => Some(spec.rope.rotary(&self.gpu, pass.context)?),
            false => None,
        };
        let rotary = longer.as_ref().unwrap_or(&self.rotary);
        let chunk = pass.chunk;
        let tokens = NewTokens {
            sequences: chunk.ids.shape[0],
            len: chunk.ids.shape[1],
            places: chunk.places.as_ref(),
            starts: chunk.starts.as_ref(),
            lengths: pass.lengths,
            paged: pass.paged,
        };
        let sizes = [spec.width, spec.ffn];
        let mut stream =
            CausalStream::new(recorder, self.dtype, tokens, spec.heads, rotary, sizes)?;
        let x = stream.state().clone();
        let places = Places::Sequence(tokens.len);
        ops::embed(stream.recorder(), &chunk.ids, &self.embedding, places, &x)?;
        for (ix, layer) in self.layers.iter().enumerate() {
            let [k, v] = kv(ix);
            stream.layer(layer, k, v, pass.attentions.get(ix))?;
        }
        let states = stream.norm(&self.norm, chunk.rows.as_ref())?;
        let epilogue = stream.epilogue();
        ops::matmul(recorder, &states, &self.logits, pass.logits, epilogue)
    }
}

/// One pass over new tokens.
pub(super) struct Pass<'a> {
    pub chunk: &'a Chunk,
    /// Positions that each sequence fills with it.
    pub lengths: &'a Tensor,
    /// The longest context that the keys may come to hold.
    pub context: u32,
    pub logits: &'a Tensor,
    /// Where each layer's weights go, if anywhere.
    pub attentions: &'a [Tensor],
    /// Where sequences lie in pages.
    pub paged: Option<Paged<'a>>,
}

fn load(mut reader: Reader, spec: &CausalSpec, names: &CausalNames) -> Result<CausalModel> {
    let (d, eps) = (spec.width, spec.norm_eps);
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = spec.heads;
    let norm = |reader: &mut Reader, name: String| -> Result<Norm> {
        Ok(Norm {
            gamma: reader.vector(&format!("{name}.weight"), d)?,
            beta: None,
            eps,
        })
    };
    let table = reader.table(names.embedding, spec.vocab, d)?;
    let logits = match spec.tied_logits {
        true => table.clone(),
        false => reader.table(names.logits, spec.vocab, d)?,
    };
    // A copy of a tied tensor that some exports save all the same.
    reader.skip(names.logits);
    let mut layers = Vec::new();
    for (ix, &window) in spec.windows.iter().enumerate() {
        let layer = format!("{}.{ix}", names.layer);
        let part = |name: &str| format!("{layer}.{name}");
        let [q, k, v, out] = names.projections.map(part);
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        reader.skip(&part(names.frequencies));
        let qk_norm = match spec.qk_norm {
            true => {
                let mut gamma = Vec::new();
                for name in names.qk_norms {
                    gamma.extend(reader.take(&format!("{}.weight", part(name)), &[head_dim])?);
                }
                let shape = [2, head_dim];
                let gamma = reader
                    .gpu
                    .upload_floats("qk norm", DType::F32, &shape, &gamma)?;
                Some(QkNorm { gamma, eps })
            }
            false => None,
        };
        let pair = [names.gate, names.up].map(|name| (part(name), spec.ffn));
        let down = [(part(names.down), d)];
        layers.push(CausalLayer {
            attention_norm: norm(&mut reader, part(names.attention_norm))?,
            qkv: reader.linear(
                &[(q, queries), (k, keys), (v, keys)],
                d,
                Columns::SideBySide,
                spec.qkv_bias,
            )?,
            qk_norm,
            window,
            out: reader.linear(&[(out, d)], queries, Columns::SideBySide, spec.out_bias)?,
            feed_forward_norm: norm(&mut reader, part(names.feed_forward_norm))?,
            gate_up: reader.linear(&pair, d, Columns::InTurns, spec.ffn_bias)?,
            activation: spec.activation,
            down: reader.linear(&down, spec.ffn, Columns::SideBySide, spec.ffn_bias)?,
        });
    }
    let norm = norm(&mut reader, names.norm.to_string())?;
    let (gpu, dtype) = (reader.gpu.clone(), reader.dtype);
    reader.finish()?;
    Ok(CausalModel {
        spec: spec.clone(),
        dtype,
        embedding: Embedding {
            table,
            vocab: spec.vocab,
            positions: None,
            first_position: 0,
            scale: 1.0,
        },
        layers,
        norm,
        logits: Linear {
            weight: logits,
            bias: None,
            n: spec.vocab,
        },
        rotary: spec.rope.rotary(&gpu, 0)?,
        gpu,
    })
}

//! From a directory to a model on the device.

use super::weights::Weights;
use super::{Model, Names, Positions, Source, Spec, Stack, marian};
use crate::gpu::{DType, Gpu, Tensor};
use crate::layers::{CrossAttention, DecoderLayer, EncoderLayer, FeedForward, SelfAttention};
use crate::ops::{Embedding, Linear, Matrix, Norm};
use crate::{Error, Result};

impl Model {
    /// Loads a model: `config.json` and `model.safetensors` of the source. `progress` hears of bytes
    /// taken and bytes in all. `dtype` stores weights and activations; softmax state and sums are f32.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is missing, damaged, or contradicts another one; [`Error::Refused`]
    /// for a model that no kernel can honour.
    pub fn load(
        gpu: &Gpu,
        source: &Source,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        let config_path = source.path().join("config.json");
        let config = source.json("config.json")?;
        let (spec, names) = match config.get("model_type").and_then(|value| value.as_str()) {
            Some("marian") => (marian::spec(&config_path, &config)?, &marian::NAMES),
            other => {
                return Err(Error::refused(
                    format!("model_type in {}", config_path.display()),
                    other.unwrap_or("absent"),
                    "marian is known",
                ));
            }
        };
        Model::load_as(gpu, source, &spec, names, dtype, progress)
    }

    /// Loads `model.safetensors` of the source as what `spec` says, under MarianMT's names: for stacks
    /// that no config describes.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_spec(
        gpu: &Gpu,
        source: &Source,
        spec: &Spec,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        Model::load_as(gpu, source, spec, &marian::NAMES, dtype, progress)
    }

    fn load_as(
        gpu: &Gpu,
        source: &Source,
        spec: &Spec,
        names: &Names,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        if dtype == DType::F16 && !gpu.caps().f16 {
            return Err(Error::refused(
                "dtype",
                "f16",
                "f32: this device has no f16 in shaders",
            ));
        }
        spec.check()?;
        let weights_path = source.path().join("model.safetensors");
        let weights = Weights::new(&weights_path, source.must("model.safetensors")?)?;
        let loader = Loader {
            gpu,
            spec,
            names,
            dtype,
            weights,
            progress,
        };
        loader.model()
    }
}

struct Loader<'a> {
    gpu: &'a Gpu,
    spec: &'a Spec,
    names: &'a Names,
    dtype: DType,
    weights: Weights,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Loader<'_> {
    fn model(mut self) -> Result<Model> {
        let (spec, names) = (self.spec, self.names);
        let (source_vocab, target_vocab) = (spec.source_vocab, spec.target_vocab);

        let all_shared = spec.shared_embeddings && spec.tied_logits;
        // Where source and target are said to be shared, exports may still have one each.
        let fall_back = |weights: &Weights, name| spec.shared_embeddings && !weights.has(name);
        let own = |weights: &Weights, name| match all_shared || fall_back(weights, name) {
            true => names.shared_embedding,
            false => name,
        };
        let source_name = own(&self.weights, names.source_embedding);
        let target_name = own(&self.weights, names.target_embedding);
        let source_table = self.table(source_name, source_vocab)?;
        let target_table = match target_name == source_name {
            true => source_table.clone(),
            false => self.table(target_name, target_vocab)?,
        };
        let logits_table = match spec.tied_logits {
            true => target_table.clone(),
            false => self.table(names.logits, target_vocab)?,
        };
        // Copies of tied tensors and sinusoidal tables that some exports save all the same.
        for name in [
            names.shared_embedding,
            names.source_embedding,
            names.target_embedding,
            names.logits,
        ] {
            self.weights.skip(name);
        }
        let logits_bias = match spec.logits_bias {
            true => Some(self.padded(names.logits_bias, &[1, target_vocab])?),
            false => None,
        };
        let source = self.embedding(source_table, source_vocab, names.source_positions)?;
        let target = self.embedding(target_table, target_vocab, names.target_positions)?;

        let encoder = (0..spec.encoder.layers)
            .map(|ix| self.encoder_layer(&format!("{}.{ix}", names.encoder_layer)))
            .collect::<Result<_>>()?;
        let decoder = (0..spec.decoder.layers)
            .map(|ix| self.decoder_layer(&format!("{}.{ix}", names.decoder_layer)))
            .collect::<Result<_>>()?;
        let (encoder_norm, decoder_norm) = match spec.final_norm {
            true => (
                Some(self.norm(names.encoder_norm)?),
                Some(self.norm(names.decoder_norm)?),
            ),
            false => (None, None),
        };
        self.weights.finish()?;
        Ok(Model {
            gpu: self.gpu.clone(),
            spec: spec.clone(),
            dtype: self.dtype,
            source,
            encoder,
            encoder_norm,
            target,
            decoder,
            decoder_norm,
            logits: Linear {
                weight: logits_table,
                bias: logits_bias,
                n: target_vocab,
            },
        })
    }

    fn take(&mut self, name: &str, shape: &[u32]) -> Result<Vec<f32>> {
        let values = self.weights.take(name, shape)?;
        let (done, all) = self.weights.progress();
        (self.progress)(done, all);
        Ok(values)
    }

    /// A matrix `[N, K]` as products read it: `[K, N rounded up to 4]`; several are put side by side.
    fn columns(&mut self, label: &str, matrices: &[Vec<f32>], n: u32, k: u32) -> Result<Matrix> {
        let (n, k) = (n as usize, k as usize);
        let stride = (n * matrices.len()).next_multiple_of(4);
        let mut columns = vec![0.0f32; k * stride];
        // Tiles keep both sides of the transposition in the cache.
        const TILE: usize = 32;
        for (part, matrix) in matrices.iter().enumerate() {
            for row_from in (0..n).step_by(TILE) {
                for column_from in (0..k).step_by(TILE) {
                    for row in row_from..(row_from + TILE).min(n) {
                        for column in column_from..(column_from + TILE).min(k) {
                            columns[column * stride + part * n + row] = matrix[row * k + column];
                        }
                    }
                }
            }
        }
        let shape = [k as u32, stride as u32];
        Matrix::dense(
            self.gpu
                .upload_floats(label, self.dtype, &shape, &columns)?,
        )
    }

    /// An embedding table `[V, d]`, laid out for the logits' product.
    fn table(&mut self, name: &str, vocab: u32) -> Result<Matrix> {
        let values = self.take(name, &[vocab, self.spec.width])?;
        self.columns(name, &[values], vocab, self.spec.width)
    }

    /// f32 values, padded with zeros to whole fours.
    fn padded(&mut self, name: &str, shape: &[u32]) -> Result<Tensor> {
        let mut values = self.take(name, shape)?;
        values.resize(values.len().next_multiple_of(4), 0.0);
        self.gpu
            .upload_floats(name, DType::F32, &[values.len() as u32], &values)
    }

    fn embedding(&mut self, table: Matrix, vocab: u32, positions: &str) -> Result<Embedding> {
        let (d, n) = (self.spec.width, self.spec.max_positions);
        let (values, first_position, rows) = match self.spec.positions {
            Positions::Sinusoidal => {
                self.weights.skip(positions);
                (sinusoidal(n, d), 0, n)
            }
            Positions::Learned { first } => {
                (self.take(positions, &[n + first, d])?, first, n + first)
            }
        };
        Ok(Embedding {
            table,
            vocab,
            positions: self
                .gpu
                .upload_floats("positions", DType::F32, &[rows, d], &values)?,
            first_position,
            scale: self.spec.embed_scale,
        })
    }

    /// Dense layers under one prefix as one, side by side: each `name`.weight `[n, k]` and `name`.bias `[n]`.
    fn linear(&mut self, prefix: &str, names: &[&str], n: u32, k: u32) -> Result<Linear> {
        let mut matrices = Vec::new();
        let mut bias = Vec::new();
        for name in names {
            matrices.push(self.take(&format!("{prefix}.{name}.weight"), &[n, k])?);
            bias.extend(self.take(&format!("{prefix}.{name}.bias"), &[n])?);
        }
        let n_all = n * names.len() as u32;
        bias.resize(bias.len().next_multiple_of(4), 0.0);
        Ok(Linear {
            weight: self.columns(prefix, &matrices, n, k)?,
            bias: Some(
                self.gpu
                    .upload_floats(prefix, DType::F32, &[bias.len() as u32], &bias)?,
            ),
            n: n_all,
        })
    }

    fn norm(&mut self, name: &str) -> Result<Norm> {
        let d = self.spec.width;
        let gamma = self.take(&format!("{name}.weight"), &[d])?;
        let beta = self.take(&format!("{name}.bias"), &[d])?;
        Ok(Norm {
            gamma: self.gpu.upload_floats(name, DType::F32, &[d], &gamma)?,
            beta: self.gpu.upload_floats(name, DType::F32, &[d], &beta)?,
            eps: self.spec.norm_eps,
        })
    }

    fn self_attention(&mut self, layer: &str) -> Result<SelfAttention> {
        let (names, d) = (self.names, self.spec.width);
        let prefix = format!("{layer}.{}", names.self_attention);
        let [q, k, v, out] = names.projections;
        Ok(SelfAttention {
            qkv: self.linear(&prefix, &[q, k, v], d, d)?,
            out: self.linear(&prefix, &[out], d, d)?,
            norm: self.norm(&format!("{layer}.{}", names.self_norm))?,
        })
    }

    fn cross_attention(&mut self, layer: &str) -> Result<CrossAttention> {
        let (names, d) = (self.names, self.spec.width);
        let prefix = format!("{layer}.{}", names.cross_attention);
        let [q, k, v, out] = names.projections;
        Ok(CrossAttention {
            q: self.linear(&prefix, &[q], d, d)?,
            kv: self.linear(&prefix, &[k, v], d, d)?,
            out: self.linear(&prefix, &[out], d, d)?,
            norm: self.norm(&format!("{layer}.{}", names.cross_norm))?,
        })
    }

    fn feed_forward(&mut self, layer: &str, stack: Stack) -> Result<FeedForward> {
        let (names, d) = (self.names, self.spec.width);
        Ok(FeedForward {
            up: self.linear(layer, &[names.up], stack.ffn, d)?,
            down: self.linear(layer, &[names.down], d, stack.ffn)?,
            activation: self.spec.activation,
            norm: self.norm(&format!("{layer}.{}", names.feed_forward_norm))?,
        })
    }

    fn encoder_layer(&mut self, layer: &str) -> Result<EncoderLayer> {
        Ok(EncoderLayer {
            attention: self.self_attention(layer)?,
            feed_forward: self.feed_forward(layer, self.spec.encoder)?,
        })
    }

    fn decoder_layer(&mut self, layer: &str) -> Result<DecoderLayer> {
        Ok(DecoderLayer {
            attention: self.self_attention(layer)?,
            cross: self.cross_attention(layer)?,
            feed_forward: self.feed_forward(layer, self.spec.decoder)?,
        })
    }
}

/// Sines in the first half of a row, cosines in the second: column i of either is the angle
/// p / 10000^(2 i / d), as Marian lays them out. `[P, d]`
fn sinusoidal(positions: u32, d: u32) -> Vec<f32> {
    let sines = d.div_ceil(2);
    (0..positions)
        .flat_map(|p| {
            (0..d).map(move |column| {
                let (i, cosine) = match column < sines {
                    true => (column, false),
                    false => (column - sines, true),
                };
                let angle = p as f64 / 10000f64.powf(2.0 * i as f64 / d as f64);
                (if cosine { angle.cos() } else { angle.sin() }) as f32
            })
        })
        .collect()
}

//! Weights from their files onto the device, laid out for the kernels.

use super::weights::Weights;
use super::{Columns, gguf};
use crate::gguf::Gguf;
use crate::gpu::{DType, Gpu, Tensor};
use crate::ops::{Linear, Matrix};
use crate::{Error, Result};

/// Takes tensors by name, and tells how far it has got.
pub(super) struct Reader<'a> {
    pub gpu: &'a Gpu,
    /// How matrices of floats are stored.
    pub dtype: DType,
    pub tensors: Tensors,
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// The files that tensors come from.
pub(super) enum Tensors {
    Safetensors(Weights),
    /// With the bytes taken so far.
    Gguf {
        gguf: Gguf,
        taken: u64,
    },
}

impl Reader<'_> {
    pub fn has(&self, name: &str) -> bool {
        match &self.tensors {
            Tensors::Safetensors(weights) => weights.has(name),
            Tensors::Gguf { gguf, .. } => gguf.header().tensors.contains_key(name),
        }
    }

    /// That tensor may be left where it is.
    pub fn skip(&mut self, name: &str) {
        if let Tensors::Safetensors(weights) = &mut self.tensors {
            weights.skip(name);
        }
    }

    /// An error if a tensor was not asked for. What a GGUF file has was held against its metadata.
    pub fn finish(self) -> Result<()> {
        match self.tensors {
            Tensors::Safetensors(weights) => weights.finish(),
            Tensors::Gguf { .. } => Ok(()),
        }
    }

    /// A tensor as floats.
    pub fn take(&mut self, name: &str, shape: &[u32]) -> Result<Vec<f32>> {
        let values = match &mut self.tensors {
            Tensors::Safetensors(weights) => weights.take(name, shape)?,
            Tensors::Gguf { gguf, .. } => gguf.floats(name, shape)?,
        };
        self.took(&[name]);
        Ok(values)
    }

    fn took(&mut self, names: &[&str]) {
        let (done, all) = match &mut self.tensors {
            Tensors::Safetensors(weights) => weights.progress(),
            Tensors::Gguf { gguf, taken } => {
                let infos = &gguf.header().tensors;
                let of = names.iter().filter_map(|&name| infos.get(name));
                *taken += of.map(|info| info.range.len() as u64).sum::<u64>();
                let all = infos.values().map(|info| info.range.len() as u64);
                (*taken, all.sum())
            }
        };
        (self.progress)(done, all);
    }

    /// Tensors `[N, K]`, each of its own N, as one matrix.
    fn matrix(&mut self, names: &[(String, u32)], k: u32, columns: Columns) -> Result<Matrix> {
        if let Tensors::Gguf { gguf, .. } = &self.tensors {
            let matrix = gguf::matrix(self.gpu, gguf, names, k, columns, self.dtype)?;
            let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
            self.took(&names);
            return Ok(matrix);
        }
        let mut parts = Vec::new();
        for (name, n) in names {
            let part = self.take(name, &[*n, k])?;
            // Where GGUF's matrices, one by one, become f32, a directory's are in the type that was asked for.
            let most = half::f16::MAX.to_f32();
            let large = |x: &&f32| self.dtype == DType::F16 && x.abs() > most;
            if let Some(x) = part.iter().find(large) {
                let bound = format!("at most {most} in f16: f32 holds it");
                return Err(Error::refused(format!("an element of {name}"), x, bound));
            }
            parts.push(part);
        }
        dense(self.gpu, &names[0].0, self.dtype, &parts, k, columns)
    }

    /// f32 values, padded with zeros to whole fours.
    pub fn padded(&mut self, label: &str, mut values: Vec<f32>) -> Result<Tensor> {
        values.resize(values.len().next_multiple_of(4), 0.0);
        self.gpu
            .upload_floats(label, DType::F32, &[values.len() as u32], &values)
    }

    /// f32 values as they are in the file. `[n]`
    pub fn vector(&mut self, name: &str, n: u32) -> Result<Tensor> {
        let values = self.take(name, &[n])?;
        self.gpu.upload_floats(name, DType::F32, &[n], &values)
    }

    /// An embedding table `[V, d]`, laid out for the logits' product.
    pub fn table(&mut self, name: &str, vocab: u32, width: u32) -> Result<Matrix> {
        self.matrix(&[(name.to_string(), vocab)], width, Columns::SideBySide)
    }

    /// Dense layers as one: each `name`.weight `[n, k]` and, with `biased`, `name`.bias `[n]`.
    pub fn linear(
        &mut self,
        layers: &[(String, u32)],
        k: u32,
        columns: Columns,
        biased: bool,
    ) -> Result<Linear> {
        let named = |(name, n): &(String, u32)| (format!("{name}.weight"), *n);
        let weights: Vec<(String, u32)> = layers.iter().map(named).collect();
        let weight = self.matrix(&weights, k, columns)?;
        let bias = match biased {
            true => {
                let mut parts = Vec::new();
                for (name, n) in layers {
                    parts.push(self.take(&format!("{name}.bias"), &[*n])?);
                }
                let rows = parts.iter().map(|part| part.chunks_exact(1).collect());
                let bias = ordered(rows.collect(), columns).concat();
                Some(self.padded(&layers[0].0, bias)?)
            }
            false => None,
        };
        Ok(Linear {
            weight,
            bias,
            n: layers.iter().map(|(_, n)| n).sum(),
        })
    }
}

/// An error for what no kernel can bind whole, before it is made.
pub(super) fn binds(gpu: &Gpu, what: &str, bytes: u64) -> Result<()> {
    let most = gpu.caps().max_binding;
    match bytes > most {
        true => {
            let bound = format!("this device binds at most {most} bytes");
            Err(Error::refused(what, format_args!("{bytes} bytes"), bound))
        }
        false => Ok(()),
    }
}

/// Parts `[N, K]`, each of its own N, as one matrix of floats as products read it, `[K, sum of N rounded up to 4]`.
pub(super) fn dense(
    gpu: &Gpu,
    label: &str,
    dtype: DType,
    parts: &[Vec<f32>],
    k: u32,
    columns: Columns,
) -> Result<Matrix> {
    let k = k as usize;
    let rows = parts.iter().map(|part| part.chunks_exact(k).collect());
    let rows: Vec<&[f32]> = ordered(rows.collect(), columns);
    let stride = rows.len().next_multiple_of(4);
    binds(gpu, label, (k * stride) as u64 * dtype.size())?;
    let mut columns = vec![0.0; k * stride];
    // Tiles keep both sides of the transposition in the cache.
    const TILE: usize = 32;
    for (tile, rows) in rows.chunks(TILE).enumerate() {
        for from in (0..k).step_by(TILE) {
            for (ix, row) in rows.iter().enumerate() {
                for column in from..(from + TILE).min(k) {
                    columns[column * stride + tile * TILE + ix] = row[column];
                }
            }
        }
    }
    let shape = [k as u32, stride as u32];
    Matrix::dense(gpu.upload_floats(label, dtype, &shape, &columns)?)
}

/// The rows of all parts in one order.
pub(super) fn ordered<T: Copy>(parts: Vec<Vec<T>>, columns: Columns) -> Vec<T> {
    match columns {
        Columns::SideBySide => parts.concat(),
        Columns::InTurns => (0..parts[0].len())
            .flat_map(|ix| parts.iter().map(move |part| part[ix]))
            .collect(),
    }
}

//! Weights from their files onto the device, laid out for the kernels.

use super::weights::Weights;
use crate::Result;
use crate::gpu::{DType, Gpu, Tensor};
use crate::ops::{Linear, Matrix};

/// Takes tensors by name, and tells how far it has got.
pub(super) struct Reader<'a> {
    pub gpu: &'a Gpu,
    /// How matrices are stored.
    pub dtype: DType,
    pub weights: Weights,
    pub progress: &'a mut dyn FnMut(u64, u64),
}

impl Reader<'_> {
    pub fn take(&mut self, name: &str, shape: &[u32]) -> Result<Vec<f32>> {
        let values = self.weights.take(name, shape)?;
        let (done, all) = self.weights.progress();
        (self.progress)(done, all);
        Ok(values)
    }

    /// Matrices `[N, K]`, each of its own N, as products read them, side by side: `[K, sum of N rounded up
    /// to 4]`.
    pub fn columns(&mut self, label: &str, matrices: &[Vec<f32>], k: u32) -> Result<Matrix> {
        let k = k as usize;
        let rows = |matrix: &Vec<f32>| matrix.len() / k;
        let stride = matrices.iter().map(rows).sum::<usize>();
        let stride = stride.next_multiple_of(4);
        let mut columns = vec![0.0f32; k * stride];
        // Tiles keep both sides of the transposition in the cache.
        const TILE: usize = 32;
        let mut from = 0;
        for matrix in matrices {
            let n = rows(matrix);
            for row_from in (0..n).step_by(TILE) {
                for column_from in (0..k).step_by(TILE) {
                    for row in row_from..(row_from + TILE).min(n) {
                        for column in column_from..(column_from + TILE).min(k) {
                            columns[column * stride + from + row] = matrix[row * k + column];
                        }
                    }
                }
            }
            from += n;
        }
        let shape = [k as u32, stride as u32];
        Matrix::dense(
            self.gpu
                .upload_floats(label, self.dtype, &shape, &columns)?,
        )
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
        let values = self.take(name, &[vocab, width])?;
        self.columns(name, &[values], width)
    }

    /// Dense layers as one, side by side: each `name`.weight `[n, k]` and, with `biased`, `name`.bias `[n]`.
    pub fn linear(&mut self, layers: &[(String, u32)], k: u32, biased: bool) -> Result<Linear> {
        let mut matrices = Vec::new();
        let mut bias = Vec::new();
        for (name, n) in layers {
            matrices.push(self.take(&format!("{name}.weight"), &[*n, k])?);
            if biased {
                bias.extend(self.take(&format!("{name}.bias"), &[*n])?);
            }
        }
        let label = &layers[0].0;
        Ok(Linear {
            weight: self.columns(label, &matrices, k)?,
            bias: match biased {
                true => Some(self.padded(label, bias)?),
                false => None,
            },
            n: layers.iter().map(|(_, n)| n).sum(),
        })
    }

    /// Two dense layers as one whose columns are pairs, one of each: `name`.weight `[n, k]` and, with
    /// `biased`, `name`.bias `[n]`.
    pub fn paired(&mut self, names: [String; 2], n: u32, k: u32, biased: bool) -> Result<Linear> {
        let mix = |[a, b]: [Vec<f32>; 2], row: usize| -> Vec<f32> {
            let rows = a.chunks(row).zip(b.chunks(row));
            rows.flat_map(|(a, b)| a.iter().chain(b).copied()).collect()
        };
        let mut both = |ending: &str, shape: &[u32]| -> Result<[Vec<f32>; 2]> {
            let [a, b] = &names;
            let first = self.take(&format!("{a}.{ending}"), shape)?;
            Ok([first, self.take(&format!("{b}.{ending}"), shape)?])
        };
        let matrix = mix(both("weight", &[n, k])?, k as usize);
        let bias = match biased {
            true => Some(mix(both("bias", &[n])?, 1)),
            false => None,
        };
        Ok(Linear {
            weight: self.columns(&names[0], &[matrix], k)?,
            bias: match bias {
                Some(bias) => Some(self.padded(&names[0], bias)?),
                None => None,
            },
            n: 2 * n,
        })
    }
}

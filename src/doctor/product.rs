//! A matrix product beside the oracle.

use super::{Outcome, Tolerance};
use crate::Result;
use crate::gpu::{DType, Gpu, Recorder};
use crate::ops::{Epilogue, Linear, Matrix, matmul};
use crate::reference;

/// More rows and columns than one workgroup has.
const M: usize = 70;
const N: usize = 100;
/// Sums of three tiles, the last not whole; of weights in blocks three blocks.
const K: usize = 92;
#[cfg(feature = "models")]
const K_OF_BLOCKS: usize = 96;

/// Whole multiples of 1 / 64 within 1, so that all are f16 as they are.
fn number(at: usize) -> f32 {
    ((at * 7919 + at / 13) % 129) as f32 / 64.0 - 1.0
}

/// Runs it, all of it stored as `dtype`, on cooperative matrices where the device takes them for it; the worst error
/// in units of the tolerance, or what is wrong. In f32 with weights in q4_1 too, whose offsets have shuffles of
/// their own.
pub(super) fn run(gpu: &Gpu, dtype: DType) -> Result<Outcome> {
    let w: Vec<f32> = (0..K * N).map(|at| number(at + 5)).collect();
    let columns: Vec<f64> = (0..N * K)
        .map(|at| f64::from(w[at % K * N + at / K]))
        .collect();
    let weight = gpu.upload_floats("w", dtype, &[K as u32, N as u32], &w)?;
    let dense = judge(gpu, dtype, K, Matrix::dense(weight)?, &columns)?;
    #[cfg(feature = "models")]
    if let (DType::F32, Ok(worst)) = (dtype, &dense) {
        let (weight, columns) = q4_1(gpu)?;
        let blocks = judge(gpu, dtype, K_OF_BLOCKS, weight, &columns)?;
        return Ok(blocks
            .map(|error| error.max(*worst))
            .map_err(|said| format!("{said} (weights in q4_1)")));
    }
    Ok(dense)
}

/// A matrix in blocks, as ggml lays them out, and its columns.
#[cfg(feature = "models")]
fn q4_1(gpu: &Gpu) -> Result<(Matrix, Vec<f64>)> {
    use half::f16;

    let mut rows = Vec::new();
    let mut values = Vec::new();
    for block in 0..N * K_OF_BLOCKS / 32 {
        let (scale, offset) = (1.0 / 16.0, number(block));
        let quants: Vec<u8> = (0..32)
            .map(|at| ((block * 5 + at * 7) % 16) as u8)
            .collect();
        rows.extend(f16::from_f32(scale).to_le_bytes());
        rows.extend(f16::from_f32(offset).to_le_bytes());
        rows.extend((0..16).map(|at| quants[at] | quants[at + 16] << 4));
        values.extend(
            quants
                .iter()
                .map(|&quant| f64::from(scale * f32::from(quant) + offset)),
        );
    }
    let rows: Vec<&[u8]> = rows.chunks(rows.len() / N).collect();
    let storage = crate::ops::Storage::Q4_1;
    let weight = Matrix::blocks(gpu, "w", storage, K_OF_BLOCKS as u32, &rows)?;
    Ok((weight, values))
}

/// X `[M, k]` times W, `columns` `[N, k]`.
fn judge(gpu: &Gpu, dtype: DType, k: usize, weight: Matrix, columns: &[f64]) -> Result<Outcome> {
    let x: Vec<f32> = (0..M * k).map(number).collect();
    let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let want = reference::linear(&wide, k, columns, None);
    let linear = Linear {
        weight,
        bias: None,
        n: N as u32,
    };
    let x = gpu.upload_floats("x", dtype, &[M as u32, k as u32], &x)?;
    let y = gpu.empty("y", dtype, &[M as u32, N as u32])?;
    let mut recorder = Recorder::new(gpu);
    matmul(&mut recorder, &x, &linear, &y, Epilogue::default())?;
    gpu.run(&recorder.finish()?)?;
    let got = gpu.read_floats(&y)?;
    let tolerance = Tolerance::new(dtype, k as u32);
    let mut worst: f64 = 0.0;
    for (row, (got, want)) in got.chunks(N).zip(want.chunks(N)).enumerate() {
        let error = tolerance.worst(got, want);
        if error > 1.0 {
            let said = format!("row {row} is off by {error:.3} of what is allowed");
            return Ok(Err(said));
        }
        worst = worst.max(error);
    }
    Ok(Ok(worst))
}

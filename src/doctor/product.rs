//! A matrix product beside the oracle.

use super::{Outcome, Tolerance};
use crate::Result;
use crate::gpu::{DType, Gpu, Recorder};
use crate::ops::{Epilogue, Linear, Matrix, matmul};
use crate::reference;

/// More rows and columns than one workgroup has, and sums of three tiles, the last not whole.
const M: usize = 70;
const K: usize = 92;
const N: usize = 100;

/// Runs it, all of it stored as `dtype`, on cooperative matrices where the device takes them for it; the worst error
/// in units of the tolerance, or what is wrong.
pub(super) fn run(gpu: &Gpu, dtype: DType) -> Result<Outcome> {
    // Whole multiples of 1 / 64, so that all are f16 as they are.
    let number = |at: usize| ((at * 7919 + at / 13) % 129) as f32 / 64.0 - 1.0;
    let x: Vec<f32> = (0..M * K).map(number).collect();
    let w: Vec<f32> = (0..K * N).map(|at| number(at + 5)).collect();
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let columns: Vec<f64> = (0..N * K)
        .map(|at| f64::from(w[at % K * N + at / K]))
        .collect();
    let want = reference::linear(&wide(&x), K, &columns, None);

    let shape = |rows: usize, columns: usize| [rows as u32, columns as u32];
    let weight = gpu.upload_floats("w", dtype, &shape(K, N), &w)?;
    let linear = Linear {
        weight: Matrix::dense(weight)?,
        bias: None,
        n: N as u32,
    };
    let x = gpu.upload_floats("x", dtype, &shape(M, K), &x)?;
    let y = gpu.empty("y", dtype, &shape(M, N))?;
    let mut recorder = Recorder::new(gpu);
    matmul(&mut recorder, &x, &linear, &y, Epilogue::default())?;
    gpu.run(&recorder.finish()?)?;
    let got = gpu.read_floats(&y)?;
    let tolerance = Tolerance::new(dtype, K as u32);
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

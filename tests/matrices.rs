//! Products with weights of every storage against the oracle, and embeddings that are columns of them.
#![cfg(feature = "models")]

#[path = "support/compare.rs"]
mod compare;
#[path = "support/device.rs"]
mod device;
#[path = "support/grid/mod.rs"]
mod grid;

use compare::{compare_rows, round_to, tolerance};
use device::gpu;
use grid::Random;
use qkv::gguf::Blocks;
use qkv::gpu::{Caps, CoopShape, DType, Gpu, Matrices, Recorder, Tensor};
use qkv::ops::{self, Activation, Embedding, Epilogue, Linear, Matrix, Places, Storage};
use qkv::reference;

const STORAGES: [Storage; 5] = [
    Storage::F32,
    Storage::F16,
    Storage::Q8_0,
    Storage::Q4_0,
    Storage::Q4_1,
];

/// Behind every result; no kernel may write there.
const CANARY: f32 = 7.75;

/// A matrix on the device, and its elements by column, `[N, K]`.
struct Weights {
    matrix: Matrix,
    values: Vec<f64>,
}

/// Random bytes in blocks, with scales among which are zeros, negative and subnormal ones.
fn blocks(random: &mut Random, storage: Storage, n: usize, k: usize) -> (Blocks, Vec<u8>) {
    let (blocks, halves) = match storage {
        Storage::Q8_0 => (Blocks::Q8_0, 1),
        Storage::Q4_0 => (Blocks::Q4_0, 1),
        Storage::Q4_1 => (Blocks::Q4_1, 2),
        Storage::F32 | Storage::F16 => unreachable!("no blocks"),
    };
    let unit = if storage == Storage::Q8_0 { 0.01 } else { 0.15 };
    let mut bytes = Vec::new();
    for _ in 0..n * k / 32 {
        for half in 0..halves {
            let scale = match random.below(16) {
                0 => 0.0,
                1 => 3e-6,
                _ => unit * random.float() * if half == 1 { 8.0 } else { 1.0 },
            };
            bytes.extend(half::f16::from_f64(scale).to_le_bytes());
        }
        let quants = blocks.bytes() - 2 * halves;
        bytes.extend((0..quants).map(|_| random.below(256) as u8));
    }
    (blocks, bytes)
}

fn weights(gpu: &Gpu, random: &mut Random, storage: Storage, n: usize, k: usize) -> Weights {
    let (name, dtype) = match storage {
        Storage::F32 => ("f32", DType::F32),
        Storage::F16 => ("f16", DType::F16),
        _ => {
            let (blocks, bytes) = blocks(random, storage, n, k);
            let rows: Vec<&[u8]> = bytes.chunks(bytes.len() / n).collect();
            let values = blocks.expand(&bytes);
            return Weights {
                matrix: Matrix::blocks(gpu, "w", storage, k as u32, &rows).unwrap(),
                values: values.into_iter().map(f64::from).collect(),
            };
        }
    };
    let values: Vec<f64> = (0..n * k).map(|_| round_to(name, random.float())).collect();
    let stride = n.next_multiple_of(4);
    let mut columns = vec![0.0; k * stride];
    for (ix, &value) in values.iter().enumerate() {
        columns[ix % k * stride + ix / k] = value as f32;
    }
    let shape = [k as u32, stride as u32];
    let tensor = gpu.upload_floats("w", dtype, &shape, &columns).unwrap();
    Weights {
        matrix: Matrix::dense(tensor).unwrap(),
        values,
    }
}

fn floats(random: &mut Random, name: &str, n: usize) -> Vec<f64> {
    (0..n).map(|_| round_to(name, random.float())).collect()
}

fn upload(gpu: &Gpu, dtype: DType, shape: &[usize], values: &[f64]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
    let shape: Vec<u32> = shape.iter().map(|&n| n as u32).collect();
    gpu.upload_floats("x", dtype, &shape, &values).unwrap()
}

/// A result with a canary behind it.
fn result(gpu: &Gpu, dtype: DType, n: usize) -> Tensor {
    upload(gpu, dtype, &[n + 64], &vec![CANARY.into(); n + 64])
}

fn without_canary(gpu: &Gpu, y: &Tensor, n: usize) -> Vec<f32> {
    let mut values = gpu.read_floats(y).unwrap();
    assert!(
        values[n..].iter().all(|&x| x == CANARY),
        "written past the end"
    );
    values.truncate(n);
    values
}

/// One product beside the oracle's; the answer is the kernel and the worst ratio of error to tolerance.
fn product(
    gpu: &Gpu,
    seed: u64,
    storage: Storage,
    [m, k, n]: [usize; 3],
    dtype: DType,
    around: bool,
) -> (&'static str, f64) {
    let random = &mut Random::new(seed);
    let name = if dtype == DType::F16 { "f16" } else { "f32" };
    let Weights { matrix, mut values } = weights(gpu, random, storage, n, k);
    let x = floats(random, name, m * k);
    // Matrices' operands are f16, weights in blocks among them.
    let on_matrices = gpu.caps().matrices != Matrices::Unused && storage != Storage::F32;
    if on_matrices && dtype == DType::F16 && m >= 32 {
        values.iter_mut().for_each(|x| *x = round_to("f16", *x));
    }
    let mut bias = floats(random, "f32", n);
    // Of even columns around it is a gate and what it lets through.
    let gated = around && n.is_multiple_of(2);
    let columns = if gated { n / 2 } else { n };
    let residual = floats(random, name, m * columns);

    let mut want = reference::linear(&x, k, &values, around.then_some(&bias));
    let silu = |x| reference::Activation::Silu.at(x);
    if gated {
        let pairs = want.chunks(2).zip(&residual);
        want = pairs.map(|(y, r)| silu(y[0]) * y[1] + r).collect();
    } else if around {
        for (y, residual) in want.iter_mut().zip(&residual) {
            *y = silu(*y) + residual;
        }
    }
    bias.resize(n.next_multiple_of(4), 0.0);
    let linear = Linear {
        weight: matrix,
        bias: around.then(|| upload(gpu, DType::F32, &[bias.len()], &bias)),
        n: n as u32,
    };
    let residual = upload(gpu, dtype, &[m, columns], &residual);
    let epilogue = Epilogue {
        activation: around.then_some(Activation::Silu),
        gated,
        residual: around.then_some(&residual),
        batch_invariant: false,
    };
    let x = upload(gpu, dtype, &[m, k], &x);
    let y = result(gpu, dtype, m * columns);
    let mut recorder = Recorder::new(gpu);
    ops::matmul(&mut recorder, &x, &linear, &y, epilogue).unwrap();
    let kernel = recorder.kernels()[0];
    gpu.run(&recorder.finish().unwrap()).unwrap();
    let got = without_canary(gpu, &y, m * columns);
    // A sum's error grows with what is summed, which may be much more than what comes out.
    let scale = (k as f64).sqrt().max(1.0);
    let what = format!("{storage:?} {m}x{k}x{n} {name} {around}");
    let close = tolerance(name, k).times(scale / 16.0 + 1.0);
    let worst = compare_rows(&what, &got, &want, columns, close).unwrap();
    (kernel, worst)
}

/// The device, and three that go other ways: hardware of small subgroups and of those that bear more rows a thread, and
/// one where lanes pass nothing on.
fn devices() -> [Gpu; 4] {
    let caps = gpu().caps();
    let hardware = |n| Caps {
        software: false,
        subgroups: Some((n, n)),
        ..caps.clone()
    };
    [
        gpu().clone(),
        gpu().narrowed(hardware(8)),
        gpu().narrowed(hardware(32)),
        gpu().narrowed(caps.without_subgroups()),
    ]
}

#[test]
fn products_are_the_oracles_for_every_storage() {
    let (mut runs, mut worst) = (0, 0.0f64);
    for gpu in &devices() {
        for storage in STORAGES {
            for (ix, m) in [1, 2, 3, 4, 5, 7, 31, 33, 70].into_iter().enumerate() {
                for [k, n] in [[32, 1], [64, 3], [96, 67], [160, 130], [576, 192]] {
                    let seed = (m * 1000 + k + n) as u64;
                    let dtype = if ix % 3 == 2 { DType::F16 } else { DType::F32 };
                    let around = (m + n) % 2 == 0;
                    let (_, ratio) = product(gpu, seed, storage, [m, k, n], dtype, around);
                    worst = worst.max(ratio);
                    runs += 1;
                }
                // Of floats K may be anything.
                if matches!(storage, Storage::F32 | Storage::F16) {
                    for k in [1, 5, 36, 103] {
                        let shape = [m, k, 6];
                        let (_, ratio) = product(gpu, k as u64, storage, shape, DType::F32, true);
                        worst = worst.max(ratio);
                        runs += 1;
                    }
                }
            }
        }
    }
    println!("{runs} products, worst {worst:.3} of the tolerance");
    assert_eq!(runs, 4 * 9 * (5 * 5 + 2 * 4));
}

#[test]
fn a_row_has_the_same_bits_beside_any_others() {
    for gpu in &devices() {
        for storage in STORAGES {
            let random = &mut Random::new(storage as u64);
            let (rows, k, n) = (130, 608, 70);
            let weight = weights(gpu, random, storage, n, k).matrix;
            let bias = None;
            let linear = Linear {
                weight,
                bias,
                n: n as u32,
            };
            let x = floats(random, "f32", rows * k);
            let run = |from: usize, m: usize| {
                let x = upload(gpu, DType::F32, &[m, k], &x[from * k..][..m * k]);
                let y = result(gpu, DType::F32, m * n);
                let mut recorder = Recorder::new(gpu);
                let epilogue = Epilogue {
                    batch_invariant: true,
                    ..Default::default()
                };
                ops::matmul(&mut recorder, &x, &linear, &y, epilogue).unwrap();
                gpu.run(&recorder.finish().unwrap()).unwrap();
                let got = without_canary(gpu, &y, m * n);
                got.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
            };
            let together = run(0, rows);
            for m in [1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 63, 64, 65, 129] {
                for from in [0, 1, rows - m] {
                    assert!(
                        run(from, m) == together[from * n..][..m * n],
                        "{storage:?}: {m} rows from {from}"
                    );
                }
            }
        }
    }
}

#[test]
fn products_on_matrices_are_the_oracles() {
    let caps = gpu().caps();
    if !caps.f16 || caps.subgroups.is_none() {
        return println!("0 products: this device has no f16, or no subgroups");
    }
    let plain = [16, 8].map(|m| {
        let shape = CoopShape {
            m,
            n: m,
            k: m,
            ab: "f16".into(),
            cr: "f32".into(),
        };
        gpu().narrowed(Caps {
            cooperative: vec![shape],
            matrices: Matrices::Plain,
            ..caps.clone()
        })
    });
    let own = (!caps.cooperative.is_empty()).then(|| gpu().clone());
    let (mut runs, mut worst) = (0, 0.0f64);
    for (ix, gpu) in plain.iter().chain(&own).enumerate() {
        // Mesa's driver compiles for seconds at every launch of these, so that each variant has one; storages are not
        // told apart by the size of matrices.
        for (storage, shape, around) in [
            (Storage::F16, [70, 164, 130], true),
            (Storage::F16, [32, 157, 67], false),
            (Storage::Q8_0, [129, 96, 130], true),
            (Storage::Q4_0, [33, 64, 1], false),
            (Storage::Q4_1, [65, 160, 67], true),
        ]
        .into_iter()
        .take(if ix == 1 { 1 } else { 5 })
        {
            let (kernel, ratio) = product(gpu, 7, storage, shape, DType::F16, around);
            assert_eq!(kernel, "matmul_coop", "{storage:?} {shape:?}");
            worst = worst.max(ratio);
            runs += 1;
        }
        // Few rows, weights in f32 and activations in f32 have their own kernels.
        for (storage, m, dtype) in [
            (Storage::F16, 31, DType::F16),
            (Storage::F32, 70, DType::F16),
            (Storage::F16, 70, DType::F32),
        ] {
            let (kernel, _) = product(gpu, 5, storage, [m, 64, 20], dtype, false);
            assert_eq!(kernel, "matmul");
        }
    }
    println!("{runs} products, worst {worst:.3} of the tolerance");
    assert!(runs >= 6, "{runs}");
}

#[test]
fn embeddings_are_columns_of_every_storage() {
    let gpu = gpu();
    for storage in STORAGES {
        for (vocab, d) in [(1, 32), (7, 64), (133, 96)] {
            let random = &mut Random::new(vocab as u64);
            let Weights { matrix, values } = weights(gpu, random, storage, vocab, d);
            let ids: Vec<u32> = (0..11).map(|_| random.below(vocab as u32)).collect();
            let lengths = gpu.upload_u32("lengths", &[11], &[1; 11]).unwrap();
            let zeros = upload(gpu, DType::F32, &[16, d], &vec![0.0; 16 * d]);
            for (lengths, positions) in [
                (None, None),
                (None, Some(&zeros)),
                (Some(&lengths), None),
                (Some(&lengths), Some(&zeros)),
            ] {
                let embedding = Embedding {
                    table: matrix.clone(),
                    vocab: vocab as u32,
                    positions: positions.cloned(),
                    first_position: 0,
                    scale: 1.0,
                };
                let places = match lengths {
                    None => Places::Sequence(11),
                    Some(lengths) => Places::Lengths(lengths),
                };
                let x = result(gpu, DType::F32, 11 * d);
                let device_ids = gpu.upload_u32("ids", &[11], &ids).unwrap();
                let mut recorder = Recorder::new(gpu);
                ops::embed(&mut recorder, &device_ids, &embedding, places, &x).unwrap();
                gpu.run(&recorder.finish().unwrap()).unwrap();
                let got = without_canary(gpu, &x, 11 * d);
                let want = ids.iter().flat_map(|&id| &values[id as usize * d..][..d]);
                let want: Vec<f64> = want.copied().collect();
                // A multiplication and an addition, each rounded once.
                let what = format!("{storage:?} {vocab}x{d}");
                let close = compare::Tolerance {
                    atol: 0.0,
                    rtol: 2e-7,
                };
                compare_rows(&what, &got, &want, d, close).unwrap();
            }
        }
    }
}

#[test]
fn blocks_take_the_bytes_that_the_file_takes() {
    let random = &mut Random::new(3);
    for (storage, bytes) in [
        (Storage::Q8_0, 34),
        (Storage::Q4_0, 18),
        (Storage::Q4_1, 20),
    ] {
        let matrix = weights(gpu(), random, storage, 192, 576).matrix;
        assert_eq!(matrix.bytes(), 192 * 576 / 32 * bytes);
        assert_eq!(
            (matrix.k(), matrix.stride(), matrix.storage()),
            (576, 192, storage)
        );
    }
}

#[test]
fn what_is_no_matrix_in_blocks_is_refused_by_name() {
    let (gpu, random) = (gpu(), &mut Random::new(4));
    let (_, good) = blocks(random, Storage::Q8_0, 2, 64);
    let columns: Vec<&[u8]> = good.chunks(68).collect();
    let refused = |k, storage, columns: &[&[u8]]| {
        let made = Matrix::blocks(gpu, "blk.0.attn_q.weight", storage, k, columns);
        made.expect_err("a refusal").to_string()
    };
    let said = refused(48, Storage::Q8_0, &columns);
    assert_eq!(
        said,
        "the inputs of blk.0.attn_q.weight is 48: a multiple of 32, as q8_0 blocks are"
    );
    assert!(refused(0, Storage::Q8_0, &columns).contains("multiple of 32"));
    assert!(refused(96, Storage::Q8_0, &columns).contains("68 bytes in column 0"));
    assert!(refused(64, Storage::F16, &columns).contains("q8_0, q4_0 or q4_1"));
    let mut bad = good.clone();
    bad[34..36].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    let columns: Vec<&[u8]> = bad.chunks(68).collect();
    assert!(refused(64, Storage::Q8_0, &columns).contains("inf: every scale is finite"));

    let tensor = |dtype, shape: &[u32]| gpu.empty("w", dtype, shape).unwrap();
    for (dtype, shape) in [
        (DType::U32, &[4, 4][..]),
        (DType::BF16, &[4, 4]),
        (DType::F32, &[4, 6]),
        (DType::F32, &[4, 4, 4]),
        (DType::F32, &[0, 4]),
    ] {
        assert!(Matrix::dense(tensor(dtype, shape)).is_err());
    }
}

//! The kernels of decoder-only stacks, one by one, beside the oracle.

use qkv::gpu::{DType, Recorder, Tensor};
use qkv::ops::{self, Activation, Epilogue, Linear, Matrix, Norm};
use qkv::reference::{self, rms_norm};

use crate::compare::{FINITE_32, compare_rows, round_to, tolerance};
use crate::grid::Random;
use crate::{gpu, singles};

pub fn floats() -> Vec<DType> {
    match gpu().caps().f16 {
        true => vec![DType::F32, DType::F16],
        false => vec![DType::F32],
    }
}

/// Numbers in -1 .. 1 as they are stored.
pub fn noise(seed: u64, n: usize, dtype: DType) -> Vec<f64> {
    let mut random = Random::new(seed);
    (0..n)
        .map(|_| round_to(dtype.name(), random.float()))
        .collect()
}

pub fn upload(values: &[f64], dtype: DType, shape: &[u32]) -> Tensor {
    gpu()
        .upload_floats("test", dtype, shape, &singles(values))
        .unwrap()
}

pub fn run(record: impl FnOnce(&mut Recorder)) {
    let mut recorder = Recorder::new(gpu());
    record(&mut recorder);
    gpu().run(&recorder.finish().unwrap()).unwrap();
}

#[test]
fn rms_norms_of_all_rows_and_of_some_equal_the_oracle() {
    for dtype in floats() {
        for width in [1usize, 5, 64, 130] {
            let x = noise(1, 4 * width, dtype);
            let gamma = noise(2, width, DType::F32);
            let d = width as u32;
            let norm = Norm {
                gamma: upload(&gamma, DType::F32, &[d]),
                beta: None,
                eps: 1e-3,
            };
            let eps = f64::from(norm.eps);
            let input = upload(&x, dtype, &[4, d]);
            let all = gpu().empty("all", dtype, &[4, d]).unwrap();
            let some = gpu().empty("some", dtype, &[3, d]).unwrap();
            let rows = gpu().upload_u32("rows", &[3], &[3, 0, 3]).unwrap();
            run(|recorder| {
                ops::norm(recorder, &input, &norm, &all).unwrap();
                ops::norm_rows(recorder, &input, &norm, &rows, &some).unwrap();
            });
            let want = rms_norm(&x, &gamma, eps);
            let picked: Vec<f64> = [3, 0, 3]
                .iter()
                .flat_map(|row| want[row * width..][..width].to_vec())
                .collect();
            let tol = tolerance(dtype.name(), width);
            for (tensor, want) in [(&all, &want), (&some, &picked)] {
                let got = gpu().read_floats(tensor).unwrap();
                compare_rows("rms norm", &got, want, width, tol).unwrap();
                let other = rms_norm(&x, &gamma, 0.01);
                assert!(compare_rows("another eps", &got, &other, width, tol).is_err());
            }
        }
    }
}

#[test]
fn a_norm_about_the_mean_of_some_rows_equals_the_oracle() {
    let (x, gamma, beta) = (
        noise(1, 21, DType::F32),
        noise(2, 7, DType::F32),
        noise(3, 7, DType::F32),
    );
    let norm = Norm {
        gamma: upload(&gamma, DType::F32, &[7]),
        beta: Some(upload(&beta, DType::F32, &[7])),
        eps: 1e-5,
    };
    let input = upload(&x, DType::F32, &[3, 7]);
    let rows = gpu().upload_u32("rows", &[1], &[2]).unwrap();
    let y = gpu().empty("y", DType::F32, &[1, 7]).unwrap();
    run(|recorder| ops::norm_rows(recorder, &input, &norm, &rows, &y).unwrap());
    let want = reference::layer_norm(&x[14..], &gamma, &beta, f64::from(norm.eps));
    let got = gpu().read_floats(&y).unwrap();
    compare_rows("layer norm", &got, &want, 7, tolerance("f32", 7)).unwrap();
}

#[test]
fn gated_products_equal_the_oracle() {
    let mut runs = 0;
    for dtype in floats() {
        for (m, pairs, k) in [
            (1usize, 1usize, 5usize),
            (1, 33, 8),
            (3, 7, 64),
            (5, 2, 9),
            (40, 37, 12),
        ] {
            for (ix, activation) in [Activation::Silu, Activation::Gelu].into_iter().enumerate() {
                for has_bias in [false, true] {
                    for has_residual in [false, true] {
                        gated(
                            [m, pairs, k],
                            dtype,
                            activation,
                            [has_bias, has_residual],
                            ix,
                        );
                        runs += 1;
                    }
                }
            }
        }
    }
    println!("{runs} products");
}

fn gated(
    [m, pairs, k]: [usize; 3],
    dtype: DType,
    activation: Activation,
    [has_bias, has_residual]: [bool; 2],
    ix: usize,
) {
    let n = 2 * pairs;
    let x = noise(1, m * k, dtype);
    let weight = noise(2, n * k, dtype);
    let bias = noise(3, n, DType::F32);
    let residual = noise(4, m * pairs, dtype);
    // W [N, K] as products read it: [K, N], rows padded to fours.
    let stride = n.next_multiple_of(4);
    let mut columns = vec![0.0; k * stride];
    for row in 0..n {
        for column in 0..k {
            columns[column * stride + row] = weight[row * k + column];
        }
    }
    let mut padded = bias.clone();
    padded.resize(stride, 0.0);
    let linear = Linear {
        weight: Matrix::dense(upload(&columns, dtype, &[k as u32, stride as u32])).unwrap(),
        bias: has_bias.then(|| upload(&padded, DType::F32, &[stride as u32])),
        n: n as u32,
    };
    let input = upload(&x, dtype, &[m as u32, k as u32]);
    let added = upload(&residual, dtype, &[m as u32, pairs as u32]);
    // A row more than there is, of canaries.
    let frame = vec![f64::from(f32::from_bits(FINITE_32.0)).min(7.0); (m + 1) * pairs];
    let y = upload(&frame, DType::F32, &[m as u32 + 1, pairs as u32]);
    run(|recorder| {
        let epilogue = Epilogue {
            activation: Some(activation),
            gated: true,
            residual: has_residual.then_some(&added),
            batch_invariant: false,
        };
        ops::matmul(recorder, &input, &linear, &y, epilogue).unwrap();
    });
    let oracle = [reference::Activation::Silu, reference::Activation::Gelu][ix];
    let product = reference::linear(&x, k, &weight, has_bias.then_some(&bias[..]));
    let want: Vec<f64> = product
        .chunks(2)
        .enumerate()
        .map(|(at, pair)| {
            oracle.at(pair[0]) * pair[1] + if has_residual { residual[at] } else { 0.0 }
        })
        .collect();
    let got = gpu().read_floats(&y).unwrap();
    let (got, behind) = got.split_at(m * pairs);
    // Erf's rational form is good to 1.5e-7 of one, and values are near one.
    compare_rows(
        "gated product",
        got,
        &want,
        pairs,
        tolerance("f32", k).times(2.0),
    )
    .unwrap();
    assert!(
        behind.iter().all(|&x| f64::from(x) == frame[0]),
        "written past the end"
    );
}

/// What a refusal says.
#[track_caller]
fn refused(record: impl FnOnce(&mut Recorder) -> qkv::Result<()>) -> String {
    match record(&mut Recorder::new(gpu())) {
        Err(error @ qkv::Error::Refused { .. }) => error.to_string(),
        other => panic!("not refused: {other:?}"),
    }
}

fn empty(dtype: DType, shape: &[u32]) -> Tensor {
    gpu().empty("test", dtype, shape).unwrap()
}

#[test]
fn shapes_that_no_kernel_can_read_are_refused() {
    let (x, y) = (empty(DType::F32, &[4, 8]), empty(DType::F32, &[4, 8]));
    let rows = empty(DType::U32, &[4]);
    for shape in [&[0][..], &[], &[2, 4]] {
        let norm = Norm {
            gamma: empty(DType::F32, shape),
            beta: None,
            eps: 1e-5,
        };
        for said in [
            refused(|recorder| ops::norm(recorder, &x, &norm, &y)),
            refused(|recorder| ops::norm_rows(recorder, &x, &norm, &rows, &y)),
        ] {
            assert!(said.starts_with("the shape of a norm's gamma"), "{said}");
        }
    }

    let histories = empty(DType::U32, &[4, 16]);
    for beams in [0, 3] {
        let said = refused(|recorder| {
            ops::reorder(recorder, &rows, &empty(DType::U32, &[4]), &histories, beams)
        });
        assert!(said.starts_with(&format!("beams is {beams}")), "{said}");
    }
    let said =
        refused(|recorder| ops::reorder(recorder, &rows, &rows, &empty(DType::U32, &[4]), 1));
    assert!(said.starts_with("the shape of rows"), "{said}");

    // Logits, allowed and chosen tokens.
    let good: [&[u32]; 3] = [&[4, 40], &[2, 2], &[4, 1, 2]];
    for (ix, bad, word) in [
        (0, &[160][..], "the shape of logits"),
        (0, &[4, 0], "the shape of logits"),
        (1, &[4], "the shape of allowed tokens"),
        (1, &[1, 4], "allowed tokens"),
        (2, &[8], "the shape of chosen tokens"),
        (2, &[4, 0, 2], "the shape of chosen tokens"),
    ] {
        let mut shapes = good;
        shapes[ix] = bad;
        let logits = empty(DType::F32, shapes[0]);
        let [allowed, chosen] = [1, 2].map(|ix| empty(DType::U32, shapes[ix]));
        let [lengths, ids] = [(); 2].map(|()| empty(DType::U32, &[4]));
        let said = refused(|recorder| {
            let choice = ops::Choice {
                logits: &logits,
                allowed: &allowed,
                lengths: &lengths,
                chosen: &chosen,
                ids: &ids,
                renormalize: false,
            };
            ops::choose(recorder, choice)
        });
        assert!(said.starts_with(word), "{said}");
        if ix == 0 {
            let (rules, seen) = (empty(DType::U32, &[4, 8]), empty(DType::U32, &[4, 2]));
            let said = refused(|recorder| {
                let draw = ops::Draw {
                    logits: &logits,
                    rules: &rules,
                    seen: &seen,
                    lengths: &lengths,
                    chosen: &chosen,
                    ids: &ids,
                    top_k: false,
                    top_p: false,
                };
                ops::sample(recorder, draw)
            });
            assert!(said.starts_with(word), "{said}");
        }
    }

    let embed = |positions: &[u32], places| {
        let embedding = ops::Embedding {
            table: Matrix::dense(empty(DType::F32, &[8, 12])).unwrap(),
            vocab: 12,
            positions: Some(empty(DType::F32, positions)),
            first_position: 0,
            scale: 1.0,
        };
        refused(|recorder| ops::embed(recorder, &rows, &embedding, places, &x))
    };
    for shape in [&[0, 8][..], &[], &[8]] {
        let said = embed(shape, ops::Places::Sequence(4));
        assert!(said.starts_with("the shape of positions"), "{said}");
    }
    let said = embed(&[4, 8], ops::Places::Sequence(0));
    assert!(said.starts_with("a sequence's places is 0"), "{said}");
}

#[test]
fn results_in_the_buffer_of_what_is_read_are_refused() {
    let linear = Linear {
        weight: Matrix::dense(empty(DType::F32, &[8, 8])).unwrap(),
        bias: None,
        n: 8,
    };
    let norm = Norm {
        gamma: empty(DType::F32, &[8]),
        beta: None,
        eps: 1e-5,
    };
    let (x, residual) = (empty(DType::F32, &[4, 8]), empty(DType::F32, &[4, 8]));
    let epilogue = Epilogue {
        residual: Some(&residual),
        ..Epilogue::default()
    };
    for y in [&x, &residual] {
        let said = refused(|recorder| ops::matmul(recorder, &x, &linear, y, epilogue));
        assert!(
            said.starts_with("a matrix product's result is in"),
            "{said}"
        );
    }
    let said = refused(|recorder| ops::norm(recorder, &x, &norm, &x));
    assert!(said.starts_with("a norm's result is in"), "{said}");
    let rows = empty(DType::U32, &[4, 16]);
    let lengths = Tensor::from_wgpu(rows.buffer().clone(), DType::U32, &[4]).unwrap();
    let parents = empty(DType::U32, &[4]);
    let said = refused(|recorder| ops::reorder(recorder, &parents, &lengths, &rows, 2));
    assert!(said.starts_with("rows is in"), "{said}");
}

#[test]
fn types_that_no_kernel_has_are_refused() {
    let matrix = |dtype| Linear {
        weight: Matrix::dense(empty(dtype, &[8, 8])).unwrap(),
        bias: None,
        n: 8,
    };
    let norm = Norm {
        gamma: empty(DType::F32, &[8]),
        beta: None,
        eps: 1e-5,
    };
    let plain = gpu().narrowed(gpu().caps().without_f16());
    let f32 = DType::F32;
    for (dtype, bound) in [
        (DType::BF16, "f32 or f16"),
        (DType::U32, "f32 or f16"),
        (DType::F16, "f32: this device has no f16"),
    ] {
        let said = |record: &dyn Fn(&mut Recorder) -> qkv::Result<()>| {
            let said = match record(&mut Recorder::new(&plain)) {
                Err(error @ qkv::Error::Refused { .. }) => error.to_string(),
                other => panic!("not refused: {other:?}"),
            };
            let bound = format!(" is {}: {bound}", dtype.name());
            assert!(
                said.starts_with("the type of") && said.contains(&bound),
                "{said}"
            );
        };
        let [x, y] = [(); 2].map(|()| empty(dtype, &[4, 8]));
        let [x_32, y_32] = [(); 2].map(|()| empty(f32, &[4, 8]));
        let epilogue = Epilogue::default();
        said(&|recorder| ops::norm(recorder, &x, &norm, &y));
        said(&|recorder| ops::matmul(recorder, &x, &matrix(f32), &y_32, epilogue));
        said(&|recorder| ops::matmul(recorder, &x_32, &matrix(f32), &y, epilogue));
        if dtype == DType::F16 {
            said(&|recorder| ops::matmul(recorder, &x_32, &matrix(dtype), &y_32, epilogue));
        }
    }
}

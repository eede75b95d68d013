//! Buffers of the caller's: lent scratch, and tensors in buffers that are larger than they.

use qkv::attention::record_in;

use super::problems::{dense, refused};
use super::*;

/// Recorded, run, and what it wrote.
fn run(
    gpu: &Gpu,
    tensors: &Tensors,
    out: &Tensor,
    options: &Options,
    scratch: Option<&Tensor>,
) -> Vec<f32> {
    let mut recorder = Recorder::new(gpu);
    let plan = match scratch {
        Some(scratch) => record_in(&mut recorder, tensors, options, scratch),
        None => record(&mut recorder, tensors, options),
    };
    plan.unwrap();
    gpu.run(&recorder.finish().unwrap()).unwrap();
    gpu.read_floats(out).unwrap()
}

fn noise(seed: u64, shape: &[u32]) -> Tensor {
    let mut random = grid::Random::new(seed);
    let n = shape.iter().product::<u32>();
    let values: Vec<f32> = (0..n).map(|_| random.float() as f32).collect();
    gpu().upload_floats("noise", F32, shape, &values).unwrap()
}

/// A tensor at the beginning of a buffer of `bytes`.
fn within(bytes: u32, dtype: DType, shape: &[u32]) -> Tensor {
    let whole = gpu().empty("whole", DType::U32, &[bytes / 4]).unwrap();
    Tensor::from_wgpu(whole.buffer().clone(), dtype, shape).unwrap()
}

#[test]
fn scratch_in_the_buffer_of_a_tensor_and_scratch_that_is_short_are_refused() {
    let make = |shape: &[u32]| gpu().empty("tensor", F32, shape).unwrap();
    let large = [1, 1, 1 << 12, 16];
    let [q, k, v, out] = [(); 4].map(|()| make(&large));
    let (lse, weights) = (make(&[1, 1, 8]), make(&[1, 1, 8, 24]));
    let kv_len = gpu().upload_u32("kv_len", &[1], &[24]).unwrap();
    let tensors = Tensors {
        lse: Some(&lse),
        weights: Some(&weights),
        kv_len: Some(&kv_len),
        ..Tensors::new(
            dense(&q, [1, 1, 8, 16]),
            dense(&k, [1, 1, 24, 16]),
            dense(&v, [1, 1, 24, 16]),
            dense(&out, [1, 1, 8, 16]),
        )
    };
    // The raw scores go to the weights, so that scratch is taken for the others.
    let options = Options {
        stage: Stage::Raw,
        ..Options::default()
    };
    let mut recorder = Recorder::new(gpu());
    let mut record = |scratch: &Tensor| record_in(&mut recorder, &tensors, &options, scratch);
    for other in [&q, &k, &v, &out, &lse, &weights, &kv_len] {
        let over = Tensor::from_wgpu(other.buffer().clone(), DType::U32, &[1]).unwrap();
        for scratch in [other, &over] {
            let result = record(scratch);
            let said = result.as_ref().unwrap_err().to_string();
            assert!(said.contains("in the buffer of"), "{said}");
            assert_eq!(refused(result), "scratch");
        }
    }
    // Of a large buffer, less than is needed.
    let words = record(&within(1 << 16, DType::U32, &[8 * 24]))
        .unwrap()
        .scratch;
    assert_eq!(words, 8 * 24);
    let short = within(1 << 16, DType::U32, &[8 * 24 - 1]);
    let said = record(&short).unwrap_err().to_string();
    assert!(said.contains("scratch is 764 bytes"), "{said}");
}

#[test]
fn scratch_that_is_shared_with_larger_problems_is_bound_in_part() {
    let narrow = gpu().narrowed(Caps {
        max_binding: 1 << 16,
        ..gpu().caps().clone()
    });
    let shape = [1, 2, 96, 16];
    let [q, k, v] = [1, 2, 3].map(|seed| noise(seed, &shape));
    let out = gpu().empty("out", F32, &shape).unwrap();
    // Half of the keys, and of the tiles: the map is of use.
    let bytes: Vec<u8> = (0..96 * 96).map(|n| u8::from(n % 96 < 48)).collect();
    let mask = gpu()
        .upload("mask", DType::Bool, &[1, 1, 96, 96], &bytes)
        .unwrap();
    let scratch = gpu().empty("scratch", DType::U32, &[1 << 18]).unwrap();
    let tensors = Tensors {
        mask: Some(View::broadcast(&mask, [1, 2, 96, 96]).unwrap()),
        ..Tensors::new(
            View::bhld(&q).unwrap(),
            View::bhld(&k).unwrap(),
            View::bhld(&v).unwrap(),
            View::bhld(&out).unwrap(),
        )
    };
    for route in [Some(Route::Prefill), Some(Route::Decode), None] {
        let options = Options {
            route,
            splits: route.filter(|&route| route == Route::Decode).map(|_| 2),
            ..Options::default()
        };
        let problem = Problem::new(&tensors, &options).unwrap();
        let plan = plan(&problem, narrow.caps()).unwrap();
        assert!(plan.scratch > 0, "{route:?} takes scratch");
        let own = run(&narrow, &tensors, &out, &options, None);
        assert_eq!(run(&narrow, &tensors, &out, &options, Some(&scratch)), own);
    }
}

#[test]
fn a_small_table_in_a_large_buffer_binds_its_own_bytes() {
    let narrow = gpu().narrowed(Caps {
        max_binding: 1 << 16,
        ..gpu().caps().clone()
    });
    let shape = [3, 2, 20, 16];
    let [q, k, v] = [1, 2, 3].map(|seed| noise(seed, &shape));
    let out = gpu().empty("out", F32, &shape).unwrap();
    let own = gpu().upload_u32("kv_len", &[3], &[20, 7, 0]).unwrap();
    let large = within(1 << 20, DType::U32, &[3]);
    gpu()
        .write(&large, bytemuck::cast_slice(&[20u32, 7, 0]))
        .unwrap();
    for route in Route::ALL {
        let answer = |kv_len| {
            let tensors = Tensors {
                kv_len: Some(kv_len),
                ..Tensors::new(
                    View::bhld(&q).unwrap(),
                    View::bhld(&k).unwrap(),
                    View::bhld(&v).unwrap(),
                    View::bhld(&out).unwrap(),
                )
            };
            let options = Options {
                route: Some(route),
                ..Options::default()
            };
            run(&narrow, &tensors, &out, &options, None)
        };
        assert_eq!(answer(&large), answer(&own), "{route:?}");
    }
}

#[test]
fn what_cannot_be_bound_is_said_of_all_that_it_spans() {
    let caps = Caps {
        max_binding: 4096,
        ..plans::caps()
    };
    let make = |shape: &[u32]| gpu().empty("tensor", F32, shape).unwrap();
    let integers = |shape: &[u32]| gpu().empty("integers", DType::U32, shape).unwrap();
    let small = make(&[2, 1, 1, 16]);
    let out = make(&[2, 1, 1, 16]);
    let (pool, pages) = (make(&[12, 1, 8, 16]), integers(&[2, 2]));
    let (cache, rows) = (make(&[2, 1, 40, 16]), integers(&[2, 40]));
    let cu = integers(&[3]);
    let (many, many_out, alone) = (
        make(&[1, 1, 80, 16]),
        make(&[1, 1, 80, 16]),
        make(&[2, 1, 80, 16]),
    );
    fn view(tensor: &Tensor) -> View<'_> {
        View::bhld(tensor).unwrap()
    }
    let of = |q, k, out| Tensors::new(view(q), view(k), view(k), view(out));
    for (tensors, argument, words) in [
        (
            Tensors {
                pages: Some(&pages),
                ..of(&small, &pool, &out)
            },
            "v",
            "6144 bytes for one head of the whole pool",
        ),
        (
            Tensors {
                rows: Some(&rows),
                ..of(&small, &cache, &out)
            },
            "v",
            "5120 bytes for one head of all batch rows",
        ),
        (
            Tensors {
                cu_q: Some(&cu),
                cu_k: Some(&cu),
                ..of(&many, &many, &many_out)
            },
            "o",
            "5120 bytes for one head of all sequences",
        ),
        (
            of(&small, &alone, &out),
            "v",
            "5120 bytes for one head of one batch row",
        ),
    ] {
        let options = Options {
            route: Some(Route::Decode),
            ..Options::default()
        };
        let result = plan(&Problem::new(&tensors, &options).unwrap(), &caps);
        let said = result.as_ref().unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
        assert_eq!(refused(result), argument);
    }
}

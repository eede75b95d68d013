//! The kernel for cooperative matrices, `prefill_coop`: with plain loops in their place on any device, as it is where the
//! device has them, and its choice by the plan.

use qkv::gpu::{CoopShape, Matrices, templates};

use super::options::OPTIONS;
use super::problems::dense;
use super::*;

fn shape([m, n, k]: [u32; 3], ab: &str, cr: &str) -> CoopShape {
    CoopShape {
        m,
        n,
        k,
        ab: ab.into(),
        cr: cr.into(),
    }
}

/// The device with plain loops for matrices of either size, and as it is where it has matrices. None without
/// f16 or subgroups.
fn forms() -> Vec<Gpu> {
    let caps = gpu().caps();
    if !caps.f16 || caps.subgroups.is_none() {
        println!("0 runs: this device has no f16, or no subgroups");
        return Vec::new();
    }
    let plain = [16, 8].map(|m| {
        gpu().narrowed(Caps {
            cooperative: vec![shape([m; 3], "f16", "f32")],
            matrices: Matrices::Plain,
            ..caps.clone()
        })
    });
    let own = (!caps.cooperative.is_empty()).then(|| gpu().clone());
    plain.into_iter().chain(own).collect()
}

/// Without the smaller matrices: options change nothing in the products.
fn large_forms() -> Vec<Gpu> {
    let mut forms = forms();
    forms.retain(|form| form.caps().cooperative.iter().any(|shape| shape.m == 16));
    forms
}

/// Runs every case in every form; each must take the kernel.
#[track_caller]
fn judge_matrices(cases: &[Case], forms: &[Gpu]) {
    let (mut runs, mut worst) = (0, 0.0f64);
    for (seed, case) in cases.iter().enumerate() {
        let mut prepared = Prepared::new(gpu(), case, seed as u64);
        for form in forms {
            prepared = prepared.on(form);
            let answer = prepared.run(Some(Route::Prefill), None, None).unwrap();
            let kernel = answer.plan.launches.last().unwrap().shader.kernel;
            assert_eq!(kernel, "prefill_coop", "{case:?}");
            worst = worst.max(answer.beside_plain.unwrap_or(0.0));
            runs += 1;
        }
    }
    println!("{runs} runs; errors at worst {worst:.2} times those of eager PyTorch");
    assert_eq!(runs, cases.len() * forms.len());
}

fn halves(heads: [u32; 2], len: [u32; 2], dim: [u32; 2]) -> Case {
    Case {
        types: [F16; 4],
        ..Case::new([2, 2], heads, len, dim)
    }
}

#[test]
fn matrices_of_every_length_under_every_mask_equal_the_oracle() {
    let mut cases = Vec::new();
    for causal in CAUSAL {
        for (ix, &len) in MANY.iter().chain(&[[130, 200], [1, 65]]).enumerate() {
            cases.push(Case {
                causal,
                kv_len: (ix % 2 == 0).then(|| lengths(ix, len[1])),
                ..halves([4, 2], len, [12, 20])
            });
        }
    }
    judge_matrices(&cases, &large_forms());
    // Mesa's driver compiles for seconds at every launch of many small matrices.
    let few: Vec<Case> = cases.into_iter().step_by(5).collect();
    judge_matrices(&few, &forms());
}

#[test]
fn matrices_of_every_head_dim_equal_the_oracle() {
    let at = |dims: &[[u32; 2]]| -> Vec<Case> {
        let lens = [([5, 37], vec![29, 37]), ([40, 70], vec![0, 65])];
        let of_dim = |&dim: &[u32; 2]| {
            lens.clone().map(|(len, kv_len)| Case {
                causal: Some(Align::BottomRight),
                kv_len: Some(kv_len),
                ..halves([2, 1], len, dim)
            })
        };
        dims.iter().flat_map(of_dim).collect()
    };
    judge_matrices(&at(&[[8, 8], [16, 16], [9, 24]]), &forms());
    // Drivers take half a minute and more for the many small matrices of wide heads.
    let wide = [[33, 20], [64, 64], [16, 130], [128, 8]];
    judge_matrices(&at(&wide), &large_forms());
}

#[test]
fn matrices_under_every_option_equal_the_oracle() {
    let mut cases = Vec::new();
    for (name, change) in OPTIONS {
        if ["bf16", "q8_0", "q4_0"].contains(&name) {
            continue;
        }
        let mut case = halves([4, 2], [70, 150], [12, 20]);
        change(&mut case);
        cases.push(case);
    }
    for function in [
        grid::Function::Alibi,
        grid::Function::Window,
        grid::Function::Documents,
    ] {
        cases.push(Case {
            function: Some(function),
            align: Align::TopLeft,
            ..halves([4, 2], [130, 130], [12, 20])
        });
    }
    judge_matrices(&cases, &large_forms());
}

#[test]
fn matrices_of_views_groups_and_histories_equal_the_oracle() {
    let mut cases = Vec::new();
    for dim in [12, 11] {
        for place in [
            Place::Columns,
            Place::Packed,
            Place::Gaps(4),
            Place::Gaps(3),
            Place::Transposed,
        ] {
            cases.push(Case {
                place,
                ..halves([4, 2], [35, 35], [dim, dim])
            });
        }
    }
    for heads in [[3, 3], [6, 2], [16, 2]] {
        cases.push(Case {
            batch: [4, 2],
            kv_len: Some(vec![31, 64]),
            ..halves(heads, [5, 70], [12, 20])
        });
    }
    cases.push(Case {
        histories: true,
        kv_len: Some(vec![130, 65]),
        ..halves([4, 2], [5, 130], [12, 20])
    });
    cases.push(Case {
        types: [F16, F16, F16, BF16],
        ..halves([4, 2], [33, 70], [12, 20])
    });
    judge_matrices(&cases, &forms());
}

#[test]
fn maxima_that_move_far_rescale_what_is_there() {
    let mut cases = Vec::new();
    for loud in [100.0, 1e4] {
        for (len, dim) in [
            ([33, 70], [12, 20]),
            ([70, 400], [12, 20]),
            ([33, 70], [12, 70]),
        ] {
            cases.push(Case {
                loud,
                causal: Some(Align::BottomRight),
                ..halves([4, 2], len, dim)
            });
        }
    }
    judge_matrices(&cases, &forms());
}

/// Q, K and V where key 40 is not a number, or infinite; which rows must know.
#[test]
fn what_is_not_finite_reaches_the_rows_that_see_it_alone() {
    let (len, d) = (100u32, 24u32);
    let mut random = grid::Random::new(11);
    let mut noise = || -> Vec<f32> { (0..len * d).map(|_| random.float() as f32).collect() };
    let [q, k, v] = [noise(), noise(), noise()];
    let spoil = |values: &[f32], with: f32| -> Vec<f32> {
        let mut values = values.to_vec();
        values[(40 * d) as usize..][..d as usize].fill(with);
        values
    };
    for form in forms() {
        let run = |k: &[f32], v: &[f32]| -> Vec<f32> {
            let upload = |values: &[f32]| form.upload_floats("x", F16, &[1, 1, len, d], values);
            let [q, k, v] = [&q, k, v].map(|values| upload(values).unwrap());
            let out = form.empty("out", F16, &[1, 1, len, d]).unwrap();
            let view = |tensor| dense(tensor, [1, 1, len, d]);
            let tensors = Tensors::new(view(&q), view(&k), view(&v), view(&out));
            let options = Options {
                causal: true,
                route: Some(Route::Prefill),
                ..Options::default()
            };
            let mut recorder = Recorder::new(&form);
            let plan = record(&mut recorder, &tensors, &options).unwrap();
            assert_eq!(plan.launches[0].shader.kernel, "prefill_coop");
            form.run(&recorder.finish().unwrap()).unwrap();
            form.read_floats(&out).unwrap()
        };
        let sound = run(&k, &v);
        let seen = (40 * d) as usize;
        for (ix, with) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
            .into_iter()
            .enumerate()
        {
            let got = run(&k, &spoil(&v, with));
            assert_eq!(got[..seen], sound[..seen], "V {with}");
            let reached = |x: &f32| if ix == 0 { x.is_nan() } else { *x == with };
            assert!(got[seen..].iter().all(reached), "V {with}");
        }
        let got = run(&spoil(&k, f32::NAN), &v);
        assert_eq!(got[..seen], sound[..seen], "K");
        assert!(got[seen..].iter().all(|x| x.is_nan()), "K");
    }
}

#[test]
fn the_plan_takes_matrices_that_fit() {
    let make = |dtype| gpu().empty("x", dtype, &[1 << 16]).unwrap();
    let tensors = [F16, F32, BF16].map(make);
    let kernel = |caps: &Caps, [q_len, d, dv]: [u32; 3], types: [usize; 3]| {
        let view = |ix: usize, l, d| View::new(&tensors[ix], [1, 2, l, d], 0, [0, 0, 0]).unwrap();
        let out = gpu().empty("out", F16, &[1, 2, q_len, dv]).unwrap();
        let [q, k, v] = types;
        let tensors = Tensors::new(
            view(q, q_len, d),
            view(k, 300, d),
            view(v, 300, dv),
            View::bhld(&out).unwrap(),
        );
        let plan = plan(&Problem::new(&tensors, &Options::default()).unwrap(), caps).unwrap();
        let shader = &plan.launches[0].shader;
        match shader.expand(&templates()).unwrap() {
            text if text.contains("coop_mat16x16<") => "16",
            text if text.contains("coop_mat8x8<") => "8",
            _ => shader.kernel,
        }
    };
    let with = |shapes: Vec<CoopShape>| Caps {
        cooperative: shapes,
        ..plans::caps()
    };
    let (large, small) = (shape([16; 3], "f16", "f32"), shape([8; 3], "f16", "f32"));
    let whole = with(vec![large.clone()]);
    let fits = [100, 64, 64];
    for (caps, problem, types, wanted) in [
        (whole.clone(), fits, [0; 3], "16"),
        (whole.clone(), [100, 128, 300], [0; 3], "16"),
        (whole.clone(), [100, 129, 64], [0; 3], "prefill"),
        (whole.clone(), [100, 64, 4], [0; 3], "prefill"),
        (whole.clone(), [1, 64, 64], [0; 3], "decode_lanes"),
        (whole.clone(), fits, [1, 0, 0], "prefill"),
        (whole.clone(), fits, [0, 2, 2], "prefill"),
        (with(vec![small.clone()]), fits, [0; 3], "8"),
        (with(vec![small, large.clone()]), fits, [0; 3], "16"),
        (with(Vec::new()), fits, [0; 3], "prefill"),
        (whole.without_matrices(), fits, [0; 3], "prefill"),
        // Sums in f16, and Intel's shapes.
        (
            with(vec![shape([16; 3], "f16", "f16")]),
            fits,
            [0; 3],
            "prefill",
        ),
        (
            with(vec![shape([8, 16, 16], "f16", "f32")]),
            fits,
            [0; 3],
            "prefill",
        ),
        (
            with(vec![shape([16; 3], "f32", "f32")]),
            fits,
            [0; 3],
            "prefill",
        ),
        // AMD's subgroups.
        (
            Caps {
                subgroups: Some((32, 64)),
                ..whole.clone()
            },
            fits,
            [0; 3],
            "16",
        ),
        (
            Caps {
                subgroups: Some((32, 128)),
                ..whole.clone()
            },
            fits,
            [0; 3],
            "prefill",
        ),
        (whole.without_subgroups(), fits, [0; 3], "prefill"),
        (
            Caps {
                workgroup_memory: 16 << 10,
                ..whole.clone()
            },
            fits,
            [0; 3],
            "prefill",
        ),
        (
            Caps {
                invocations: 64,
                ..whole.clone()
            },
            fits,
            [0; 3],
            "prefill",
        ),
        // A processor's matrices are no faster than its lanes.
        (
            Caps {
                software: true,
                ..whole
            },
            fits,
            [0; 3],
            "prefill_lanes",
        ),
    ] {
        assert_eq!(
            kernel(&caps, problem, types),
            wanted,
            "{problem:?} {caps:?}"
        );
    }
}

//! Time and memory grow as they should: decode with K, prefill with Q times K and causal for half of that, and no
//! fused route holds a matrix of Q times K.

#[path = "support/device.rs"]
mod device;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use device::gpu;
use qkv::attention::{Options, Plan, Problem, Route, Tensors, View, plan, record};
use qkv::gpu::{DType, Recorder, Recording, Tensor};

const DIM: u32 = 64;

/// Queries, keys, values and output, f32 and all zeros: what they hold changes nothing of the cost.
struct Inputs([Tensor; 4]);

impl Inputs {
    fn new(heads: u32, q_len: u32, k_len: u32) -> Self {
        let make = |len| {
            gpu()
                .empty("input", DType::F32, &[1, heads, len, DIM])
                .unwrap()
        };
        Inputs([make(q_len), make(k_len), make(k_len), make(q_len)])
    }

    fn tensors(&self) -> Tensors<'_> {
        let [q, k, v, o] = self.0.each_ref().map(|tensor| View::bhld(tensor).unwrap());
        Tensors::new(q, k, v, o)
    }

    fn plan(&self, options: &Options) -> Plan {
        plan(
            &Problem::new(&self.tensors(), options).unwrap(),
            gpu().caps(),
        )
        .unwrap()
    }

    fn recorded(&self, options: &Options) -> Recording {
        let mut recorder = Recorder::new(gpu());
        record(&mut recorder, &self.tensors(), options).unwrap();
        recorder.finish().unwrap()
    }
}

/// Times recordings in turn until their shortest times, in seconds, satisfy `judge`. Another program's work
/// only ever adds to a time, so that waiting brings the truth nearer; a law that does not hold never will.
#[track_caller]
fn settle(recordings: &[Recording], judge: impl Fn(&[f64]) -> Result<String, String>) {
    // One law at a time; one that fails leaves the others theirs.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let patience = Duration::from_secs(60);
    let started = Instant::now();
    let mut least = vec![Duration::MAX; recordings.len()];
    for round in 1.. {
        for (recording, least) in recordings.iter().zip(&mut least) {
            *least = gpu().time(recording).unwrap().min(*least);
        }
        // The first rounds also compile and warm up.
        if round < 5 {
            continue;
        }
        let seconds: Vec<f64> = least.iter().map(Duration::as_secs_f64).collect();
        match judge(&seconds) {
            Ok(said) => return println!("{said}; {round} rounds"),
            Err(said) if started.elapsed() > patience => panic!("{said}: {seconds:?} s"),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// The `e` of `time ~ size^e`, by least squares in the logarithms.
fn exponent(sizes: &[u32], seconds: &[f64]) -> f64 {
    let points: Vec<[f64; 2]> = sizes
        .iter()
        .zip(seconds)
        .map(|(&n, s)| [f64::from(n).ln(), s.ln()])
        .collect();
    let mean = |ix: usize| points.iter().map(|p| p[ix]).sum::<f64>() / points.len() as f64;
    let (x, y) = (mean(0), mean(1));
    let covariance: f64 = points.iter().map(|p| (p[0] - x) * (p[1] - y)).sum();
    covariance / points.iter().map(|p| (p[0] - x).powi(2)).sum::<f64>()
}

/// `value` and its name where it is in `least .. most`.
fn within(name: &str, value: f64, [least, most]: [f64; 2]) -> Result<String, String> {
    let said = format!("{name} {value:.2}");
    match (least..most).contains(&value) {
        true => Ok(said),
        false => Err(format!("{said}, not in {least} to {most}")),
    }
}

/// Larger problems for real GPUs, where small ones are over before they fill the device.
fn times(sizes: [u32; 4], factor: u32) -> [u32; 4] {
    sizes.map(|n| if gpu().caps().software { n } else { n * factor })
}

#[test]
fn decode_takes_time_in_proportion_to_the_keys() {
    let sizes = times([4096, 8192, 12288, 16384], 8);
    let recordings = sizes.map(|k_len| {
        let inputs = Inputs::new(4, 1, k_len);
        assert_eq!(inputs.plan(&Options::default()).route, Route::Decode);
        inputs.recorded(&Options::default())
    });
    settle(&recordings, |seconds| {
        within(
            "decode: K to the power of",
            exponent(&sizes, seconds),
            [0.8, 1.2],
        )
    });
}

#[test]
fn prefill_takes_time_with_the_square_and_causal_half_of_it() {
    // Mesa's software driver gives each processor a run of neighbouring workgroups: of a single causal head, the
    // second of two would get three quarters of the work. So a head for each.
    let cores = std::thread::available_parallelism().map_or(8, |n| n.get() as u32);
    let heads = if gpu().caps().software {
        cores.next_power_of_two()
    } else {
        8
    };
    // As forced, and as the plan chooses for many rows: on a processor that is `decode`.
    for (route, sizes) in [
        (Some(Route::Prefill), [384, 768, 1152, 1536]),
        (None, [768, 1536, 2304, 3072]),
    ] {
        let sizes = times(sizes, 4);
        let mut recordings = Vec::new();
        for causal in [false, true] {
            for n in sizes {
                let options = Options {
                    causal,
                    route,
                    ..Options::default()
                };
                recordings.push(Inputs::new(heads, n, n).recorded(&options));
            }
        }
        settle(&recordings, |seconds| {
            let (all, causal) = seconds.split_at(sizes.len());
            let power = |name, seconds| within(name, exponent(&sizes, seconds), [1.5, 2.5]);
            Ok([
                format!("{route:?}"),
                power("Q = K to the power of", all)?,
                power("causal", causal)?,
                within("causal over all", causal[3] / all[3], [0.4, 0.7])?,
            ]
            .join(", "))
        });
    }
}

/// Keys between a prefix and a window, which no query sees: with a short prefix at the beginning of many keys it takes
/// about as long as without.
#[test]
fn keys_between_a_prefix_and_a_window_cost_nothing() {
    let k_len = times([16384; 4], 8)[0];
    let prefix = gpu().upload_u32("prefix", &[1], &[32]).unwrap();
    for (route, q_len, splits, batch_invariant) in [
        (Route::Prefill, 256, None, false),
        (Route::Decode, 1, None, false),
        (Route::Decode, 1, Some(1), false),
        (Route::Decode, 1, None, true),
    ] {
        let inputs = Inputs::new(4, q_len, k_len);
        let options = Options {
            causal: true,
            window: [Some(2047), None],
            route: Some(route),
            splits,
            batch_invariant,
            ..Options::default()
        };
        let recordings = [None, Some(&prefix)].map(|prefix_len| {
            let tensors = Tensors {
                prefix_len,
                ..inputs.tensors()
            };
            let mut recorder = Recorder::new(gpu());
            record(&mut recorder, &tensors, &options).unwrap();
            recorder.finish().unwrap()
        });
        let name = format!("{route:?}, {splits:?} splits, with a prefix");
        settle(&recordings, |seconds| {
            within(&name, seconds[1] / seconds[0], [0.5, 1.5])
        });
    }
}

/// Bytes that a recording holds beside the problem's own tensors.
fn bytes_held(inputs: &Inputs, options: &Options) -> u64 {
    let before = gpu().counters().bytes;
    let recording = inputs.recorded(options);
    gpu().run(&recording).unwrap();
    let held = gpu().counters().bytes - before;
    let scratch = 4 * inputs.plan(options).scratch;
    assert!(held >= scratch && held <= scratch + 4096 * recording.dispatches() as u64);
    held
}

#[test]
fn no_fused_route_holds_a_matrix_of_queries_and_keys() {
    const HEADS: u32 = 4;
    let plain = |route| Options {
        route: Some(route),
        ..Options::default()
    };
    let sizes = [256, 512, 1024, 2048];
    let matrix = |n: u32| 4 * (HEADS * n * n) as u64;
    for causal in [false, true] {
        for (route, splits) in [
            (Route::Prefill, None),
            (Route::Decode, None),
            (Route::Decode, Some(4)),
        ] {
            let options = Options {
                causal,
                splits,
                ..plain(route)
            };
            let held = sizes.map(|n| bytes_held(&Inputs::new(HEADS, n, n), &options));
            println!("{route:?}, splits {splits:?}: {held:?} bytes");
            for (n, pair) in sizes.iter().zip(held.windows(2)) {
                assert!(pair[1] <= 2 * pair[0] + 4096, "twice {n}: {pair:?} bytes");
            }
        }
    }
    // Few rows and long keys: parts of the keys, as many as fill a device.
    for q_len in [1, 4] {
        let parts = [1024, 4096, 16384, 65536].map(|k_len| {
            let plan = Inputs::new(HEADS, q_len, k_len).plan(&plain(Route::Decode));
            assert!(plan.scratch < (HEADS * q_len) as u64 * 256 * (DIM + 2) as u64);
            plan.splits
        });
        println!("{q_len} queries: {parts:?} parts of the keys");
    }
    for n in sizes {
        let inputs = Inputs::new(HEADS, n, n);
        // Where a function masks, one word for each tile, which has at least 16 rows and 32 keys.
        let options = Options {
            mask_mod: Some(
                "fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool { return q >= k; }".into(),
            ),
            ..plain(Route::Prefill)
        };
        assert!(bytes_held(&inputs, &options) <= matrix(n) / (16 * 32) + 8192);
        // The measure itself sees the three passes' matrix.
        assert!(bytes_held(&inputs, &plain(Route::ThreePass)) >= matrix(n));
    }
}

#[test]
fn the_fit_finds_the_exponent() {
    let sizes = [100, 200, 400, 1000];
    for e in [0.5, 1.0, 2.0] {
        let seconds = sizes.map(|n| 3e-6 * f64::from(n).powf(e));
        assert!((exponent(&sizes, &seconds) - e).abs() < 1e-12);
    }
    assert!(
        within("power", 2.0, [0.8, 1.2]).is_err() && within("power", f64::NAN, [0.8, 1.2]).is_err()
    );
}

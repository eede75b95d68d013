//! What was measured: where it applies, where it does not, and what becomes of the file.
#![cfg(feature = "cli")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use qkv::Error;
use qkv::attention::{
    Candidate, Options, Plan, Problem, Route, Subgroups, Tensors, View, plan, plan_with,
    planned_on, record, record_as, record_in,
};
use qkv::gpu::{Caps, DType, Gpu, Recorder, Tensor};
use qkv::tune::{self, Shape};

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        let gpu = Gpu::new()
            .expect("a device: see scripts/with-gpu")
            .untuned();
        // In memory alone.
        gpu.narrowed(gpu.caps().clone())
    })
}

/// A device of its own memory of choices.
fn fresh() -> Gpu {
    gpu().narrowed(gpu().caps().clone()).untuned()
}

/// q, k, v and out of one head dim, in numbers that repeat.
struct Inputs([Tensor; 4]);

impl Inputs {
    fn new([batch, heads, kv_heads, q_len, k_len, d]: [u32; 6]) -> Inputs {
        let make = |heads: u32, len: u32| {
            let n = batch * heads * len * d;
            let values: Vec<f32> = (0..n).map(|x| (x % 17) as f32 / 8.0 - 1.0).collect();
            let shape = [batch, heads, len, d];
            gpu().upload_floats("input", DType::F32, &shape, &values)
        };
        let [q, k, v] = [(heads, q_len), (kv_heads, k_len), (kv_heads, k_len)]
            .map(|(heads, len)| make(heads, len).unwrap());
        let out = gpu().empty("out", DType::F32, q.shape()).unwrap();
        Inputs([q, k, v, out])
    }

    fn tensors(&self) -> Tensors<'_> {
        let [q, k, v, out] = [0, 1, 2, 3].map(|ix| View::bhld(&self.0[ix]).unwrap());
        Tensors::new(q, k, v, out)
    }

    fn problem(&self, options: &Options) -> Problem {
        Problem::new(&self.tensors(), options).unwrap()
    }
}

fn keep(gpu: &Gpu, problem: &Problem, choice: &str) {
    let key = problem.bucket().unwrap();
    gpu.keep_choices(&BTreeMap::from([(key, choice.to_string())]))
        .unwrap();
}

/// A choice that the table by capabilities does not make for 5 rows.
const ODD: Candidate = Candidate {
    route: Route::Decode,
    subgroups: Subgroups::Unused,
    rows: 2,
    keys: 1,
    splits: 3,
    f16_math: false,
};

#[test]
fn a_choice_applies_where_the_plan_is_free_and_nowhere_else() {
    let gpu = fresh();
    let inputs = Inputs::new([1, 2, 2, 5, 700, 8]);
    let free = Options::default();
    let problem = inputs.problem(&free);
    let table = planned_on(&gpu, &problem).unwrap();
    assert!(!table.tuned && table.candidate != ODD);
    keep(&gpu, &problem, &format!("{ODD}; 1 ms, and why"));
    let tuned = planned_on(&gpu, &problem).unwrap();
    assert_eq!((tuned.tuned, tuned.candidate, tuned.splits), (true, ODD, 3));
    assert_eq!(tuned, plan_with(&problem, gpu.caps(), Some(ODD)).unwrap());
    // Clones share it; narrowed devices take it over and keep theirs to themselves.
    assert!(planned_on(&gpu.clone(), &problem).unwrap().tuned);
    let narrowed = gpu.narrowed(gpu.caps().without_f16());
    assert!(planned_on(&narrowed, &problem).unwrap().tuned);
    keep(&narrowed, &problem, "three-pass");
    assert_eq!(planned_on(&gpu, &problem).unwrap().candidate, ODD);

    let same = |plan: &Plan, problem: &Problem| {
        assert!(!plan.tuned);
        assert_eq!(*plan, qkv::attention::plan(problem, gpu.caps()).unwrap());
    };
    for options in [
        Options {
            batch_invariant: true,
            ..free.clone()
        },
        Options {
            route: Some(Route::Decode),
            ..free.clone()
        },
        Options {
            route: Some(Route::Decode),
            splits: Some(2),
            ..free.clone()
        },
        Options {
            mask_mod: Some(
                "fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool { return true; }".into(),
            ),
            ..free.clone()
        },
    ] {
        let problem = inputs.problem(&options);
        assert_eq!(problem.bucket(), None);
        same(&planned_on(&gpu, &problem).unwrap(), &problem);
        // Not even if it is handed over.
        same(
            &plan_with(&problem, gpu.caps(), Some(ODD)).unwrap(),
            &problem,
        );
    }
    // Another bucket: causal.
    let causal = Options {
        causal: true,
        ..free.clone()
    };
    same(
        &planned_on(&gpu, &inputs.problem(&causal)).unwrap(),
        &inputs.problem(&causal),
    );
    same(
        &planned_on(&gpu.clone().untuned(), &problem).unwrap(),
        &problem,
    );
    assert!(
        !planned_on(&gpu, &problem).unwrap().tuned,
        "clones forget together"
    );
}

#[test]
fn both_choices_answer_the_same_and_lent_scratch_counts() {
    let gpu = fresh();
    let inputs = Inputs::new([1, 2, 2, 5, 700, 8]);
    let options = Options::default();
    let problem = inputs.problem(&options);
    let run = || {
        let mut recorder = Recorder::new(&gpu);
        let plan = record(&mut recorder, &inputs.tensors(), &options).unwrap();
        gpu.run(&recorder.finish().unwrap()).unwrap();
        (plan, gpu.read_floats(&inputs.0[3]).unwrap())
    };
    let (table, by_table) = run();
    keep(&gpu, &problem, &ODD.to_string());
    let (tuned, by_choice) = run();
    assert!(!table.tuned && tuned.tuned && tuned.scratch > table.scratch);
    for (a, b) in by_table.iter().zip(&by_choice) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
    // What a caller has sized for the table's plan is enough.
    for (words, taken) in [(table.scratch.max(1), &table), (tuned.scratch, &tuned)] {
        let scratch = gpu.empty("scratch", DType::U32, &[words as u32]).unwrap();
        let mut recorder = Recorder::new(&gpu);
        let plan = record_in(&mut recorder, &inputs.tensors(), &options, &scratch).unwrap();
        assert_eq!(plan, *taken);
    }
}

#[test]
fn a_choice_that_does_not_fit_is_left() {
    let inputs = Inputs::new([1, 4, 2, 30, 700, 64]);
    let problem = inputs.problem(&Options::default());
    let caps = Caps {
        subgroups: Some((32, 32)),
        ..gpu().caps().clone()
    };
    let candidate = |text: &str| -> Candidate { text.parse().unwrap() };
    for text in [
        "prefill by maxima, 2 rows",
        "prefill by lanes, 16 rows",
        "decode by lanes, 4 rows, 4 keys, 2 splits",
        "decode by lanes, 4 rows, 1 keys, 2 splits",
    ] {
        let candidate = candidate(text);
        assert!(candidate.fits(&problem, &caps), "{text}");
        assert_eq!(
            plan_with(&problem, &caps, Some(candidate))
                .unwrap()
                .candidate,
            candidate
        );
        let narrowed = caps.without_subgroups();
        assert!(!candidate.fits(&problem, &narrowed), "{text}");
        let left = plan_with(&problem, &narrowed, Some(candidate)).unwrap();
        assert_eq!(left, plan(&problem, &narrowed).unwrap());
    }
    // Subgroups of more than one size, and small ones, have no teams that are whole subgroups.
    for subgroups in [(32, 64), (4, 4)] {
        let caps = Caps {
            subgroups: Some(subgroups),
            ..caps.clone()
        };
        assert!(!candidate("prefill by lanes, 16 rows").fits(&problem, &caps));
    }
    // No kernel has these sizes.
    for text in [
        "prefill by lanes, 12 rows",
        "prefill, 8 rows",
        "decode, 16 rows, 1 keys, 1 splits",
        "decode, 2 rows, 4 keys, 1 splits",
        "decode, 2 rows, 1 keys, 701 splits",
        "prefill by matrices, 1 rows",
        "prefill by maxima in f16, 2 rows",
    ] {
        assert!(!candidate(text).fits(&problem, &caps), "{text}");
        let mut recorder = Recorder::new(gpu());
        let options = Options::default();
        let refused = record_as(&mut recorder, &inputs.tensors(), &options, candidate(text));
        assert!(matches!(refused, Err(Error::Refused { .. })), "{text}");
    }
    // 576 columns of 8 rows are more than workgroup memory holds.
    let wide = Inputs::new([1, 8, 1, 1, 9, 576]).problem(&Options::default());
    assert!(!candidate("decode, 8 rows, 1 keys, 1 splits").fits(&wide, &caps));
    // Three passes over a matrix of 4 x 30 x 700, and of a hundred times as much.
    assert!(candidate("three-pass").fits(&problem, &caps));
    let large = Inputs::new([1, 4, 2, 3000, 700, 4]).problem(&Options::default());
    assert!(!candidate("three-pass").fits(&large, &caps));
}

#[test]
fn texts_that_are_no_candidates_are_refused_and_leave_the_table() {
    let gpu = fresh();
    let inputs = Inputs::new([1, 2, 2, 5, 700, 8]);
    let problem = inputs.problem(&Options::default());
    for text in [
        "",
        "decode",
        "prefill by magic, 2 rows",
        "prefill, 2 keys",
        "prefill, two rows",
        "prefill, 2 rows, 1 keys",
        "decode, 2 rows, 1 keys",
        "decode, 2 rows, 1 keys, 0 splits",
        "decode, 99999999999 rows, 1 keys, 1 splits",
    ] {
        assert!(text.parse::<Candidate>().is_err(), "{text}");
        keep(&gpu, &problem, text);
        assert!(!planned_on(&gpu, &problem).unwrap().tuned, "{text}");
    }
}

#[test]
fn a_bucket_holds_sizes_up_to_the_next_power_of_two() {
    let bucket = |sizes| {
        Inputs::new(sizes)
            .problem(&Options::default())
            .bucket()
            .unwrap()
    };
    let one = bucket([1, 4, 2, 30, 700, 8]);
    assert_eq!(one, "heads 2 group 2 q 32 k 1024 d 8 dv 8 f32 f32 f32 f32");
    assert_eq!(one, bucket([2, 2, 1, 17, 1024, 8]));
    for other in [
        [1, 4, 2, 33, 700, 8],
        [1, 4, 2, 16, 700, 8],
        [1, 4, 2, 30, 512, 8],
        [1, 4, 2, 30, 700, 12],
        [1, 4, 4, 30, 700, 8],
        [2, 4, 2, 30, 700, 8],
    ] {
        assert_ne!(one, bucket(other), "{other:?}");
    }
}

#[test]
fn the_first_kernel_to_try_is_the_tables() {
    for sizes in [
        [1, 8, 8, 512, 512, 64],
        [1, 32, 8, 1, 4096, 128],
        [1, 8, 8, 16, 512, 64],
        [1, 2, 1, 3, 7, 5],
    ] {
        let problem = Inputs::new(sizes).problem(&Options::default());
        for subgroups in [
            None,
            Some((8, 8)),
            Some((32, 32)),
            Some((8, 32)),
            Some((64, 64)),
        ] {
            for software in [false, true] {
                let caps = Caps {
                    subgroups,
                    software,
                    ..gpu().caps().clone()
                };
                let kernels = Candidate::kernels(&problem, &caps);
                let table = plan(&problem, &caps).unwrap();
                assert_eq!(
                    kernels.first(),
                    Some(&table.candidate),
                    "{sizes:?} {caps:?}"
                );
                for candidate in kernels.into_iter().flat_map(|kernel| {
                    let splits = kernel.other_splits(&problem, &caps);
                    splits.into_iter().chain([kernel])
                }) {
                    let plan = plan_with(&problem, &caps, Some(candidate)).unwrap();
                    assert!(plan.tuned, "{sizes:?} {candidate} {caps:?}");
                    assert_eq!(plan.candidate, candidate);
                }
            }
        }
    }
}

#[test]
fn tuning_a_shape_keeps_it_and_measuring_one_does_not() {
    let gpu = fresh();
    let shape: Shape = "1,2,2,5,70,8".parse().unwrap();
    let measured = tune::measure(&gpu, &shape).unwrap();
    assert_eq!(gpu.choice(&measured.bucket), None);
    assert_eq!(measured.rejected, []);
    assert!(
        measured
            .ranking
            .iter()
            .any(|(candidate, _)| *candidate == measured.chosen)
    );
    let tuned = tune::shape(&gpu, &shape).unwrap();
    assert_eq!(gpu.choice(&tuned.bucket), Some(tuned.to_string()));
    assert_eq!(gpu.choices_path(), None, "a narrowed device writes no file");
    let problem = Inputs::new([1, 2, 2, 5, 70, 8]).problem(&Options::default());
    assert_eq!(problem.bucket(), Some(tuned.bucket));
    let plan = planned_on(&gpu, &problem).unwrap();
    assert_eq!((plan.tuned, plan.candidate), (true, tuned.chosen));
    for bad in ["1,2,3,5,70,8", "1,2,2,5,70,600"] {
        let refused = tune::measure(&gpu, &bad.parse().unwrap());
        assert!(matches!(refused, Err(Error::Refused { .. })), "{bad}");
    }
}

/// The program, with a cache directory of its own.
fn start(cache: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
    // Where users' caches lie on Linux, and on macOS.
    let command = command.env("XDG_CACHE_HOME", cache).env("HOME", cache);
    let command = command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn said(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The file that `qkv tune` says it has saved in.
fn saved_in(said: &str) -> PathBuf {
    let line = said.lines().find_map(|line| line.strip_prefix("saved in "));
    line.expect(said).into()
}

fn choices(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| line.contains(" = "));
    lines.map(str::to_string).collect()
}

#[test]
#[cfg(unix)]
fn programs_at_once_lose_nothing() {
    let cache = tempfile::tempdir().unwrap();
    let one = [
        "tune",
        "--shapes",
        "1,1,1,1,20,8",
        "1,1,1,1,40,8",
        "1,1,1,1,80,8",
    ];
    let other = [
        "tune",
        "--shapes",
        "1,1,1,1,20,12",
        "1,1,1,1,40,12",
        "1,1,1,1,80,12",
    ];
    let children = [&one, &other].map(|arguments| start(cache.path(), arguments));
    let paths = children.map(|child| saved_in(&said(child)));
    assert_eq!(paths[0], paths[1]);
    assert!(paths[0].starts_with(cache.path()));
    assert_eq!(choices(&paths[0]).len(), 6, "{:?}", choices(&paths[0]));
}

#[test]
#[cfg(unix)]
fn the_program_uses_what_it_saved_unless_told_otherwise() {
    let cache = tempfile::tempdir().unwrap();
    let input = cache.path().join("in.safetensors");
    let values: Vec<u8> = (0..2 * 70 * 8)
        .flat_map(|x| ((x % 13) as f32 / 6.0 - 1.0).to_le_bytes())
        .collect();
    let view = |rows: usize| {
        let bytes = &values[..2 * rows * 8 * 4];
        let dtype = safetensors::Dtype::F32;
        safetensors::tensor::TensorView::new(dtype, vec![1, 2, rows, 8], bytes).unwrap()
    };
    let tensors = [("q", view(5)), ("k", view(70)), ("v", view(70))];
    safetensors::serialize_to_file(tensors, None, &input).unwrap();
    let input = input.to_str().unwrap();
    let attend = |arguments: &[&str]| {
        let always = ["attend", input, "--explain", "--verify"];
        said(start(cache.path(), &[&always, arguments].concat()))
    };
    let tune = || {
        let said = said(start(
            cache.path(),
            &["tune", "--shapes", "1,2,2,5,70,8", "--all"],
        ));
        assert!(
            said.contains(", by the table\n") && !said.contains("thrown out"),
            "{said}"
        );
        saved_in(&said)
    };
    assert!(attend(&[]).contains("by the table of capabilities; heads 2 group 1"));
    let path = tune();
    assert!(attend(&[]).contains("tuned for heads 2 group 1 q 8 k 128"));
    for pinned in [
        &["--no-tune"][..],
        &["--deterministic", "batch"],
        &["--route", "decode"],
        &["--causal"],
    ] {
        assert!(!attend(pinned).contains("tuned for"), "{pinned:?}");
    }
    // A choice changed by hand, half a file, another driver's: ignored, then written anew.
    let whole = std::fs::read_to_string(&path).unwrap();
    for other in [
        whole.replace("\nheads 2 ", "\nheads 4 "),
        whole.replace("; ", ";  "),
        whole[..whole.len() / 2].to_string(),
        whole.replace("\ndriver ", "\ndriver x"),
        whole.replace("\nshaders ", "\nshaders 0"),
        String::new(),
    ] {
        assert_ne!(other, whole);
        std::fs::write(&path, &other).unwrap();
        assert!(!attend(&[]).contains("tuned for"), "{other}");
        assert_eq!(tune(), path);
        assert_eq!(choices(&path).len(), 1);
        assert!(attend(&[]).contains("tuned for"));
    }
    let refused = start(cache.path(), &["tune", "--no-tune"])
        .wait_with_output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let refused = start(cache.path(), &["tune", "--shapes", "1,2,3"])
        .wait_with_output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("1,2,3"));
}

//! A wrong kernel is seen, remembered and never chosen.

use super::*;
use crate::attention::{Options, Problem, Tensors, View, plan};
use crate::gpu::{CoopShape, Matrices};

fn gpu() -> Gpu {
    Gpu::open(None).expect("a device: see scripts/with-gpu")
}

/// The kernels that a plan takes for a few queries and for many.
fn chosen(gpu: &Gpu, dtype: DType) -> Result<Vec<&'static str>> {
    chosen_with(gpu, dtype, &Options::default())
}

fn chosen_with(gpu: &Gpu, dtype: DType, options: &Options) -> Result<Vec<&'static str>> {
    let mut kernels = Vec::new();
    for q_len in [1, 64] {
        let tensor = |len| gpu.empty("tensor", dtype, &[1, 2, len, 16]);
        let [q, k, out] = [tensor(q_len)?, tensor(64)?, tensor(q_len)?];
        let view = View::bhld;
        let tensors = Tensors::new(view(&q)?, view(&k)?, view(&k)?, view(&out)?);
        let plan = plan(&Problem::new(&tensors, options)?, gpu.caps())?;
        kernels.extend(plan.launches.iter().map(|launch| launch.shader.kernel));
    }
    Ok(kernels)
}

/// A shuffle that hands out the wrong lane's value.
const WRONG_SHUFFLE: [&str; 3] = [
    "decode_lanes",
    "subgroupShuffle(p_{{ r }}_{{ e }}, team_lane + n)",
    "subgroupShuffle(p_{{ r }}_{{ e }}, team_lane)",
];

/// Products that are wrong in variants with f16 alone.
const WRONG_F16: [&str; 3] = [
    "decode_lanes",
    "+= dot(q_{{ r }}, x_{{ e }});",
    "+= {% if F16 %}1.01 * {% endif %}dot(q_{{ r }}, x_{{ e }});",
];

/// What a compiler refuses.
const NO_WGSL: [&str; 3] = ["prefill_lanes", "fn main(", "fn main(("];

#[test]
fn a_wrong_kernel_is_seen_remembered_and_never_chosen() {
    let gpu = gpu();
    let lanes = |kernels: &[&str]| kernels.iter().any(|kernel| kernel.ends_with("_lanes"));
    if !lanes(&chosen(&gpu, DType::F32).unwrap()) {
        return println!("this device has no such kernels");
    }
    for [kernel, from, to] in [WRONG_SHUFFLE, NO_WGSL] {
        let folder = tempfile::tempdir().unwrap();
        let found = consult(&gpu.planted(kernel, from, to), Some(folder.path()));
        let Finding::Wrong(said) = &found.subgroups else {
            panic!("{kernel} passed: {found:?}");
        };
        println!("{said}");
        // What is remembered is not looked at again: the whole device would pass.
        let again = consult(&gpu, Some(folder.path()));
        assert_eq!(again, found);
        let narrow = again.narrow(&gpu);
        assert_eq!(narrow.caps().subgroups, None);
        assert!(!lanes(&chosen(&narrow, DType::F32).unwrap()));
        // The other power is as it was.
        assert_eq!(narrow.caps().f16, gpu.caps().f16);
    }
}

#[test]
fn wrong_f16_is_taken_and_subgroups_are_left() {
    let gpu = gpu();
    let kernels = chosen(&gpu, DType::F16);
    if !kernels.is_ok_and(|kernels| kernels.contains(&WRONG_F16[0])) {
        return println!("this device has no such kernels");
    }
    let [kernel, from, to] = WRONG_F16;
    let folder = tempfile::tempdir().unwrap();
    let found = consult(&gpu.planted(kernel, from, to), Some(folder.path()));
    assert_eq!(found.subgroups, Finding::Right);
    assert!(matches!(found.f16, Finding::Wrong(_)), "{found:?}");
    let narrow = consult(&gpu, Some(folder.path())).narrow(&gpu);
    assert_eq!(narrow.caps(), &gpu.caps().without_f16());
    let refused = chosen(&narrow, DType::F16).unwrap_err().to_string();
    assert!(refused.contains("f16"), "{refused}");
}

/// O that is not rescaled where its maximum moved.
const WRONG_MATRICES: [&str; 3] = [
    "prefill_coop",
    "wg_s[at + 3u]) * shrink;",
    "wg_s[at + 3u]);",
];

fn with_plain_matrices(gpu: &Gpu) -> Gpu {
    let square = CoopShape {
        m: 16,
        n: 16,
        k: 16,
        ab: "f16".into(),
        cr: "f32".into(),
    };
    gpu.narrowed(Caps {
        cooperative: vec![square],
        matrices: Matrices::Plain,
        ..gpu.caps().clone()
    })
}

#[test]
fn matrices_are_used_only_once_they_are_known_to_be_right() {
    let gpu = gpu();
    if !gpu.caps().f16 || gpu.caps().subgroups.is_none() {
        return println!("this device has no such kernels");
    }
    let gpu = with_plain_matrices(&gpu);
    let takes_matrices =
        |gpu: &Gpu| chosen(gpu, DType::F16).is_ok_and(|all| all.contains(&"prefill_coop"));
    assert!(takes_matrices(&gpu));
    assert!(!takes_matrices(&Verdict::default().narrow(&gpu)));

    let folder = tempfile::tempdir().unwrap();
    let found = consult(&gpu, Some(folder.path()));
    assert_eq!(found.matrices, Finding::Right);
    assert!(takes_matrices(&found.narrow(&gpu)));

    let folder = tempfile::tempdir().unwrap();
    let [kernel, from, to] = WRONG_MATRICES;
    let found = consult(&gpu.planted(kernel, from, to), Some(folder.path()));
    assert!(matches!(found.matrices, Finding::Wrong(_)), "{found:?}");
    let again = consult(&gpu, Some(folder.path()));
    assert_eq!(again, found);
    let narrow = again.narrow(&gpu);
    assert!(!takes_matrices(&narrow));
    // The other powers are as they were.
    assert_eq!(narrow.caps(), &gpu.caps().without_matrices());
}

/// Weights and values that are multiplied wrongly in f16 alone.
const WRONG_F16_MATH: [&str; 3] = [
    "prefill",
    "var sum_{{ i }} = p_{{ i }}.x * v_0;",
    "var sum_{{ i }} = p_{{ i }}.x * v_1;",
];

#[test]
fn wrong_products_in_f16_are_taken_alone() {
    let gpu = gpu();
    if !gpu.caps().f16 {
        return println!("this device has no such kernels");
    }
    let [kernel, from, to] = WRONG_F16_MATH;
    let folder = tempfile::tempdir().unwrap();
    let found = consult(&gpu.planted(kernel, from, to), Some(folder.path()));
    assert_eq!(found.subgroups, Finding::Right);
    assert_eq!(found.f16, Finding::Right);
    let Finding::Wrong(said) = &found.f16_math else {
        panic!("{found:?}");
    };
    assert!(said.starts_with("Prefill in f16 of `"), "{said}");
    let narrow = consult(&gpu, Some(folder.path())).narrow(&gpu);
    assert_eq!(narrow.caps(), &gpu.caps().without_f16_math());
    let options = Options {
        f16_math: true,
        ..Options::default()
    };
    assert!(chosen_with(&gpu, DType::F16, &options).is_ok());
    let refused = chosen_with(&narrow, DType::F16, &options).unwrap_err();
    assert!(
        refused.to_string().contains("gave wrong answers"),
        "{refused}"
    );
}

/// An element of X from the next lane.
const WRONG_BROADCAST: [&str; 3] = [
    "matmul",
    r#"", " ~ e ~ "u)" if BY_LANES"#,
    r#"", " ~ (e + 1) % 8 ~ "u)" if BY_LANES"#,
];
/// Sums of X for the offsets of q4_1, of half the lanes.
#[cfg(feature = "models")]
const WRONG_SUM: [&str; 3] = [
    "matmul",
    "for step in [1, 2, 4] %",
    "for step in [1, 2, 2] %",
];

#[test]
fn a_wrong_product_by_lanes_takes_subgroups() {
    let gpu = gpu();
    if !ops::passes_lanes(gpu.caps()) {
        return println!("this device has no such kernels");
    }
    let subgroups_of = |[kernel, from, to]: [&'static str; 3]| {
        let folder = tempfile::tempdir().unwrap();
        consult(&gpu.planted(kernel, from, to), Some(folder.path())).subgroups
    };
    let Finding::Wrong(said) = subgroups_of(WRONG_BROADCAST) else {
        panic!("not seen");
    };
    assert!(said.starts_with("a matrix product: row "), "{said}");
    #[cfg(feature = "models")]
    {
        let Finding::Wrong(said) = subgroups_of(WRONG_SUM) else {
            panic!("not seen in q4_1");
        };
        assert!(said.ends_with("(weights in q4_1)"), "{said}");
    }
}

#[test]
fn a_product_on_matrices_that_does_not_compile_takes_them() {
    let gpu = gpu();
    if !gpu.caps().f16 || gpu.caps().subgroups.is_none() {
        return println!("this device has no such kernels");
    }
    let gpu = with_plain_matrices(&gpu);
    let folder = tempfile::tempdir().unwrap();
    let planted = gpu.planted("matmul_coop", "fn main(", "fn main((");
    let found = consult(&planted, Some(folder.path()));
    let Finding::Wrong(said) = &found.matrices else {
        panic!("{found:?}");
    };
    assert!(said.starts_with("a matrix product: "), "{said}");
    assert_eq!(found.f16, Finding::Right);

    // The long form counts it among its checks.
    let job = job(DType::F16, DType::F16, &[]);
    let mut checks = Vec::new();
    examine_job(&planted, &job, &mut |check| checks.push(check)).unwrap();
    let right: Vec<bool> = checks.iter().map(|check| check.outcome.is_ok()).collect();
    assert_eq!(right, [false, true]);
    assert!(matches!(Verdict::of(&checks).matrices, Finding::Wrong(_)));
}

#[test]
fn what_loses_its_device_is_blamed_alone_and_the_rest_goes_on() {
    let open = || Gpu::open(None);
    let first = open().expect("a device: see scripts/with-gpu");
    // Jobs stand for their places here, and each runs what compiles soon.
    let place = |job: &Job| JOBS.iter().position(|other| std::ptr::eq(other, job));
    let (culprit, victim) = (2, 5);
    let runs = AtomicUsize::new(0);
    let run = |gpu: &Gpu, job: &Job, see: &mut dyn FnMut(Check)| {
        let product = |gpu: &Gpu| Check::product(gpu, DType::F32);
        see(product(gpu)?);
        let at = place(job).expect("one of them");
        // One loses it each time, another one's is taken along once.
        if at == culprit || at == victim && runs.fetch_add(1, Ordering::Relaxed) == 0 {
            gpu.lose();
            see(product(gpu)?);
            not_lost(gpu)?;
        }
        see(product(gpu)?);
        Ok(())
    };
    let mut heard = 0;
    let (checks, ended) = examine_jobs(&first, &open, &run, &mut |_| heard += 1);
    assert!(ended.is_none(), "{ended:?}");
    assert_eq!(runs.load(Ordering::Relaxed), 2);
    assert_eq!(checks.len(), 2 * JOBS.len());
    // What was to be made again was heard twice.
    assert_eq!(heard, checks.len() + 4);
    let wrong = |&at: &usize| checks[at].outcome.is_err();
    let wrong: Vec<usize> = (0..checks.len()).filter(wrong).collect();
    assert_eq!(wrong, [2 * culprit + 1]);
    let said = checks[wrong[0]].outcome.as_ref().unwrap_err();
    assert!(said.starts_with("the device was lost: "), "{said}");

    // What was found is kept where no memory is left, and nothing else is begun.
    let run = |gpu: &Gpu, _: &Job, see: &mut dyn FnMut(Check)| {
        see(Check::product(gpu, DType::F32)?);
        Err(Error::OutOfMemory("all of it".into()))
    };
    let (checks, ended) = examine_jobs(&open().unwrap(), &open, &run, &mut |_| {});
    assert!((1..=DEVICES).contains(&checks.len()), "{}", checks.len());
    assert!(matches!(ended, Some(Error::OutOfMemory(_))), "{ended:?}");
}

/// Names the file of attempts to a process that is to end.
const ATTEMPTS: &str = "QKV_TEST_ATTEMPTS";

/// What a driver may do to the process that examines it.
#[test]
#[ignore = "ends its process, which the next test starts"]
fn ends_its_process() {
    if let Some(path) = std::env::var_os(ATTEMPTS) {
        let mut attempts = Attempts::open(Some(Path::new(&path)));
        let _ = attempts.at("subgroups", || std::process::abort());
    }
}

#[test]
fn a_power_that_ended_two_processes_is_taken() {
    let gpu = gpu();
    if gpu.caps().subgroups.is_none() {
        return println!("this device has no such power");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = verdict::attempts_path(folder.path(), &gpu.identity());
    let forget = || {
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let file = file.unwrap().path();
            if file != path {
                std::fs::remove_file(file).unwrap();
            }
        }
    };
    let end_a_process = || {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "doctor::tests::ends_its_process", "--ignored"]);
        let output = child.env(ATTEMPTS, &path).output().unwrap();
        assert!(!output.status.success(), "{output:?}");
    };
    let left = || std::fs::read_to_string(&path).unwrap();

    // Once may have been the user's doing: it is examined again.
    end_a_process();
    assert_eq!(left(), "subgroups\n");
    let found = consult(&gpu, Some(folder.path()));
    assert_eq!(found.subgroups, Finding::Right);
    assert_eq!(left(), "");

    // What is begun and still lives counts for nothing.
    forget();
    end_a_process();
    let mut living = Attempts::open(Some(&path));
    let found = living.at("subgroups", || {
        assert_eq!(left(), "subgroups\nsubgroups\n");
        Ok(consult(&gpu, Some(folder.path())).subgroups)
    });
    drop(living);
    assert_eq!(found.unwrap(), Finding::Right);
    assert_eq!(left(), "");

    forget();
    end_a_process();
    end_a_process();
    // No kernel of the power runs again: a wrong one would be seen.
    let [kernel, from, to] = WRONG_SHUFFLE;
    let found = consult(&gpu.planted(kernel, from, to), Some(folder.path()));
    let said = "2 processes ended while they examined it";
    assert_eq!(found.subgroups, Finding::Wrong(said.into()));
    assert_eq!(left(), "");
    // It is remembered, for all that the whole device would pass, and the other power is as it was.
    let again = consult(&gpu, Some(folder.path()));
    assert_eq!(again, found);
    let narrow = again.narrow(&gpu);
    assert_eq!(narrow.caps(), &gpu.caps().without_subgroups());
    // What `qkv doctor` finds takes its place.
    let right = Verdict {
        subgroups: Finding::Right,
        ..found
    };
    right.remember(folder.path(), &gpu.identity());
    assert_eq!(consult(&gpu, Some(folder.path())), right);
}

#[test]
fn a_damaged_verdict_and_another_devices_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = Verdict {
        subgroups: Finding::Wrong("row 3 of 7".into()),
        f16: Finding::Right,
        f16_math: Finding::Wrong("row 1 of 2".into()),
        matrices: Finding::Unknown,
    };
    wrong.remember(folder.path(), "adapter A\n");
    let known = Verdict::recall(folder.path(), "adapter A\n").unwrap();
    assert_eq!(known.subgroups, Finding::Wrong("row 3 of 7".into()));
    assert_eq!(known.f16, Finding::Right);
    assert_eq!(known.f16_math, wrong.f16_math);
    assert_eq!(known.matrices, Finding::Unknown);
    assert_eq!(Verdict::recall(folder.path(), "adapter B\n"), None);

    let files = std::fs::read_dir(folder.path()).unwrap();
    let paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    let [path] = paths.as_slice() else {
        panic!("one file, not {paths:?}");
    };
    let text = std::fs::read_to_string(path).unwrap();
    let cut = (0..text.len()).map(|n| text[..n].to_string());
    let changed = [
        text.replace("shaders ", "shaders 1"),
        text.replace("right", "fine"),
        format!("{text}more\n"),
    ];
    for text in cut.chain(changed) {
        std::fs::write(path, &text).unwrap();
        let read = Verdict::recall(folder.path(), "adapter A\n");
        assert_eq!(read, None, "{text:?}");
    }
}

#[test]
fn a_device_as_it_is_passes_and_keeps_its_powers() {
    let gpu = gpu();
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let found = consult(&gpu, Some(folder.path()));
    let first = started.elapsed();
    let started = Instant::now();
    assert_eq!(consult(&gpu, Some(folder.path())), found);
    println!(
        "examined in {first:.2?}, recalled in {:.2?}",
        started.elapsed()
    );
    assert!(found.covers(gpu.caps()), "{found:?}");
    assert_eq!(found.narrow(&gpu).caps(), gpu.caps());
}

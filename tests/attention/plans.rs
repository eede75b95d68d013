//! The plan alone, on devices that are only described.

use qkv::gpu::Matrices;

use super::problems::Parts;
use super::*;

/// The powers of a device that is not there.
pub fn caps() -> Caps {
    Caps {
        name: "none".into(),
        f16: true,
        f16_math: true,
        subgroups: Some((32, 32)),
        cooperative: Vec::new(),
        matrices: Matrices::Used,
        timestamps: true,
        workgroup_memory: 48 << 10,
        invocations: 1024,
        storage_buffers: 16,
        max_binding: 1 << 31,
        max_buffer: 1 << 31,
        max_groups: 65_535,
        uniform_align: 64,
        storage_align: 64,
        software: false,
    }
}

/// The plan for dense f32 tensors with overlapping cells: a plan asks for extents only.
pub fn planned(
    [batch, heads, kv_heads]: [u32; 3],
    [q_len, k_len]: [u32; 2],
    [d, dv]: [u32; 2],
    options: &Options,
    caps: &Caps,
) -> qkv::Result<Plan> {
    let parts = Parts::new();
    let view = |tensor, extents| View::new(tensor, extents, 0, [0, 0, 0]).unwrap();
    let out = gpu().empty("out", F32, &[batch, heads, q_len, dv]).unwrap();
    let tensors = Tensors::new(
        view(&parts.input, [batch, heads, q_len, d]),
        view(&parts.input, [batch, kv_heads, k_len, d]),
        view(&parts.input, [batch, kv_heads, k_len, dv]),
        View::bhld(&out).unwrap(),
    );
    plan(&Problem::new(&tensors, options)?, caps)
}

#[test]
fn the_plan_takes_decode_for_few_rows_and_prefill_for_many() {
    let options = Options::default();
    for (heads, q_len, route) in [
        ([1, 8, 8], 1, Route::Decode),
        ([1, 64, 1], 1, Route::Decode),
        ([1, 8, 8], 16, Route::Decode),
        ([1, 8, 8], 17, Route::Prefill),
        ([1, 8, 2], 4, Route::Decode),
        ([1, 8, 2], 5, Route::Prefill),
        ([4, 2, 2], 500, Route::Prefill),
    ] {
        let plan = planned(heads, [q_len, 100], [64, 64], &options, &caps()).unwrap();
        assert_eq!(plan.route, route, "{heads:?} {q_len}");
    }
}

#[test]
fn a_processor_passes_what_it_reads_between_lanes() {
    let options = Options::default();
    let teams = Caps {
        software: true,
        subgroups: Some((8, 8)),
        ..caps()
    };
    let halves = Caps {
        subgroups: Some((8, 16)),
        ..teams.clone()
    };
    for (caps, q_len, kernel) in [
        (&teams, 8, "decode_lanes"),
        (&teams, 9, "prefill_lanes"),
        (&teams, 500, "prefill_lanes"),
        (&halves, 16, "decode_lanes"),
        (&halves, 17, "prefill"),
        (&teams.without_subgroups(), 17, "prefill"),
        (&teams.without_subgroups(), 16, "decode"),
    ] {
        let plan = planned([1, 8, 8], [q_len, 100], [64, 64], &options, caps).unwrap();
        assert_eq!(plan.launches[0].shader.kernel, kernel, "{q_len}");
    }
}

#[test]
fn the_plan_depends_on_nothing_but_its_arguments() {
    let options = Options::default();
    let make = |caps: &Caps| planned([2, 4, 2], [3, 1000], [64, 80], &options, caps).unwrap();
    assert_eq!(make(&caps()), make(&caps()));
    assert_eq!(make(&caps().without_subgroups()), make(&caps().browser()));
}

#[test]
fn long_keys_are_split_until_the_device_is_busy() {
    let options = Options::default();
    for (batch, k_len, splits) in [
        (1, 511, 1),
        (1, 1024, 2),
        (1, 4096, 8),
        (1, 1 << 20, 256),
        (8, 1 << 20, 32),
        (256, 1 << 20, 1),
    ] {
        let plan = planned([batch, 1, 1], [1, k_len], [64, 64], &options, &caps()).unwrap();
        assert_eq!(plan.splits, splits, "{batch} {k_len}");
        assert!(plan.split_len.is_multiple_of(64));
        assert!(plan.splits * plan.split_len >= k_len);
        assert_eq!(plan.launches.len(), if splits > 1 { 2 } else { 1 });
        assert_eq!(plan.launches[0].groups, u64::from(batch * splits));
        let parts = u64::from(batch * splits * (64 + 2));
        assert_eq!(plan.scratch, if splits > 1 { parts } else { 0 });
    }
}

#[test]
fn forced_splits_are_whole_steps_and_cover_the_keys() {
    for k_len in [0, 1, 63, 64, 65, 130, 449, 1500, 100_000] {
        for splits in 1..40 {
            let options = Options {
                route: Some(Route::Decode),
                splits: Some(splits),
                ..Options::default()
            };
            let plan = planned([1, 1, 1], [1, k_len], [8, 8], &options, &caps()).unwrap();
            assert!(plan.splits >= 1 && plan.splits <= splits);
            assert!(plan.splits * plan.split_len >= k_len);
            assert!(
                (plan.splits - 1) * plan.split_len < k_len.max(1),
                "no idle part"
            );
        }
    }
}

#[test]
fn every_route_is_planned_for_the_least_device() {
    let least = caps().browser();
    for [d, dv] in [
        [1, 1],
        [33, 7],
        [64, 64],
        [192, 128],
        [256, 256],
        [576, 576],
    ] {
        for route in Route::ALL {
            let options = Options {
                route: Some(route),
                ..Options::default()
            };
            let plan = planned([3, 6, 2], [70, 900], [d, dv], &options, &least).unwrap();
            assert_eq!(plan.route, route);
            assert!(plan.launches.iter().all(|launch| launch.groups > 0));
        }
    }
}

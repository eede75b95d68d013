use qkv::attention::*;
use qkv::gpu::*;
#[test]
fn smoke() {
    let gpu = Gpu::new().unwrap();
    println!("{:?}", gpu.caps());
    for (b, h, hk, q, k, d, dv) in [
        (2, 4, 2, 5, 7, 12, 12),
        (1, 2, 2, 40, 70, 64, 64),
        (1, 2, 1, 3, 700, 10, 17),
        (2, 2, 2, 33, 65, 192, 128),
        (1, 1, 1, 2, 9, 576, 512),
    ] {
        for causal in [false, true] {
            for route in Route::ALL {
                let mut seed = 1u32;
                let mut rnd = |n: u32| -> Vec<f32> {
                    (0..n)
                        .map(|_| {
                            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
                            (seed >> 8) as f32 / 8388608.0 - 1.0
                        })
                        .collect()
                };
                let (qv, kv, vv) = (
                    rnd(b * h * q * d),
                    rnd(b * hk * k * d),
                    rnd(b * hk * k * dv),
                );
                let qt = gpu
                    .upload_floats("q", DType::F32, &[b, h, q, d], &qv)
                    .unwrap();
                let kt = gpu
                    .upload_floats("k", DType::F32, &[b, hk, k, d], &kv)
                    .unwrap();
                let vt = gpu
                    .upload_floats("v", DType::F32, &[b, hk, k, dv], &vv)
                    .unwrap();
                let ot = gpu.empty("o", DType::F32, &[b, h, q, dv]).unwrap();
                let mut rec = Recorder::new(&gpu);
                let t = Tensors {
                    q: View::bhld(&qt).unwrap(),
                    k: View::bhld(&kt).unwrap(),
                    v: View::bhld(&vt).unwrap(),
                    out: View::bhld(&ot).unwrap(),
                    kv_len: None,
                    rows: None,
                    weights: None,
                };
                record(
                    &mut rec,
                    &t,
                    &Options {
                        causal,
                        route: Some(route),
                        ..Default::default()
                    },
                )
                .unwrap();
                gpu.run(&rec.finish().unwrap()).unwrap();
                let got = gpu.read_floats(&ot).unwrap();
                let mut worst = 0f64;
                for bi in 0..b {
                    for hi in 0..h {
                        for i in 0..q {
                            let kh = hi / (h / hk);
                            let end = if causal {
                                (i as i64 + k as i64 - q as i64 + 1).clamp(0, k as i64) as u32
                            } else {
                                k
                            };
                            let s: Vec<f64> = (0..end)
                                .map(|j| {
                                    (0..d)
                                        .map(|c| {
                                            qv[(((bi * h + hi) * q + i) * d + c) as usize] as f64
                                                * kv[(((bi * hk + kh) * k + j) * d + c) as usize]
                                                    as f64
                                        })
                                        .sum::<f64>()
                                        / (d as f64).sqrt()
                                })
                                .collect();
                            let m = s.iter().cloned().fold(f64::MIN, f64::max);
                            let z: f64 = s.iter().map(|x| (x - m).exp()).sum();
                            for c in 0..dv {
                                let want: f64 = (0..end)
                                    .map(|j| {
                                        (s[j as usize] - m).exp() / z
                                            * vv[(((bi * hk + kh) * k + j) * dv + c) as usize]
                                                as f64
                                    })
                                    .sum();
                                worst = worst.max(
                                    (want
                                        - got[(((bi * h + hi) * q + i) * dv + c) as usize] as f64)
                                        .abs(),
                                );
                            }
                        }
                    }
                }
                println!(
                    "{:?} {route:?} causal {causal} worst {worst:e}",
                    (b, h, hk, q, k, d, dv)
                );
                assert!(worst < 2e-6);
            }
        }
    }
}

//! GGUF files: what is in them, blocks as the package `gguf` expands them, and every way to be broken.

#![cfg(feature = "models")]

mod chats;
#[path = "../support/device.rs"]
mod device;
mod goldens;
mod outlines;
mod tokenizers;
mod writer;

use std::path::Path;

use proptest::prelude::*;
use qkv::gguf::{Blocks, Gguf, Header, List, Value};
use safetensors::SafeTensors;
use writer::{File, array, text, value};

fn parse(file: &File) -> qkv::Result<Header> {
    Header::parse(Path::new("model.gguf"), &file.bytes())
}

fn good() -> File {
    let long = [
        value(0, &[7]),
        value(1, &[0x80]),
        value(2, &65535u16.to_le_bytes()),
        value(3, &(-2i16).to_le_bytes()),
        value(4, &u32::MAX.to_le_bytes()),
        value(5, &i32::MIN.to_le_bytes()),
        value(6, &1e-5f32.to_le_bytes()),
        value(7, &[1]),
        value(8, &text("naïve")),
        array(8, &[text("a"), text("")]),
        value(10, &u64::MAX.to_le_bytes()),
        value(11, &i64::MIN.to_le_bytes()),
        value(12, &0.1f64.to_le_bytes()),
    ];
    let inner = |items: &[Vec<u8>]| array(5, items)[4..].to_vec();
    let mut file = File::new();
    for (ty, value) in long.into_iter().enumerate() {
        file = file.with(&format!("v.{ty}"), value);
    }
    file.with(
        "nested",
        array(9, &[inner(&[7i32.to_le_bytes().to_vec()]), inner(&[])]),
    )
    .tensor(
        "a",
        0,
        &[3, 2],
        bytemuck::cast_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]),
    )
    .tensor("b", 8, &[32, 2], &[1; 68])
}

#[test]
fn a_files_values_and_tensors_are_read() {
    let header = parse(&good()).unwrap();
    let wanted = [
        Value::Unsigned(7),
        Value::Signed(-128),
        Value::Unsigned(65535),
        Value::Signed(-2),
        Value::Unsigned(u32::MAX.into()),
        Value::Signed(i32::MIN.into()),
        Value::Float(1e-5f32.into()),
        Value::Flag(true),
        Value::Text("naïve".into()),
        Value::List(List::Texts(vec!["a".into(), "".into()])),
        Value::Unsigned(u64::MAX),
        Value::Signed(i64::MIN),
        Value::Float(0.1),
    ];
    for (ty, wanted) in wanted.iter().enumerate() {
        assert_eq!(&header.metadata[&format!("v.{ty}")], wanted);
    }
    let nested = List::Lists(vec![List::Signed(vec![7]), List::Signed(vec![])]);
    assert_eq!(header.list("nested").unwrap(), Some(&nested));
    assert_eq!(header.u32("v.4").unwrap(), Some(u32::MAX));
    assert_eq!(header.u32("none").unwrap(), None);
    for key in ["v.1", "v.10", "v.8"] {
        let said = header.u32(key).unwrap_err().to_string();
        assert!(said.contains(key) && said.contains("model.gguf"), "{said}");
    }
    assert_eq!(header.tensors["a"].shape, [2, 3]);
    assert_eq!(header.tensors["b"].blocks, Blocks::Q8_0);
    assert_eq!(header.tensors["b"].range.len(), 68);

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), good().bytes()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    assert_eq!(
        gguf.floats("a", &[2, 3]).unwrap(),
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    );
    for (name, shape, word) in [("a", [3, 2], "[2, 3]"), ("c", [2, 3], "no tensor c")] {
        let said = gguf.floats(name, &shape).unwrap_err().to_string();
        assert!(said.contains(word), "{said}");
    }
    let said = Gguf::open(Path::new("/no/such/file")).err().unwrap();
    assert!(said.to_string().contains("/no/such/file"));
    assert!(Gguf::open(file.path().parent().unwrap()).is_err());
}

#[test]
fn what_is_not_finite_is_refused() {
    for bits in [f32::NAN, f32::INFINITY] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let broken = File::new().tensor("a", 0, &[2], bytemuck::cast_slice(&[1.0, bits]));
        std::fs::write(file.path(), broken.bytes()).unwrap();
        let said = Gguf::open(file.path())
            .unwrap()
            .floats("a", &[2])
            .unwrap_err();
        assert!(said.to_string().contains("element 1"), "{said}");
    }
}

#[test]
fn blocks_expand_as_the_package_gguf_expands_them() {
    let bytes = std::fs::read("tests/goldens/gguf/blocks.safetensors").unwrap();
    let goldens = SafeTensors::deserialize(&bytes).unwrap();
    let all = [
        ("F32", Blocks::F32),
        ("F16", Blocks::F16),
        ("BF16", Blocks::BF16),
        ("Q8_0", Blocks::Q8_0),
        ("Q4_0", Blocks::Q4_0),
        ("Q4_1", Blocks::Q4_1),
        ("Q5_0", Blocks::Q5_0),
        ("Q4_K", Blocks::Q4_K),
        ("Q6_K", Blocks::Q6_K),
    ];
    for (name, blocks) in all {
        let raw = goldens
            .tensor(&format!("{name}.blocks"))
            .unwrap()
            .data()
            .to_vec();
        let wanted = goldens.tensor(&format!("{name}.values")).unwrap();
        let wanted: Vec<f32> = bytemuck::pod_collect_to_vec(wanted.data());
        assert!(wanted.len() >= 16);
        assert_eq!(blocks.expand(&raw), wanted, "{name}");
    }
}

#[test]
fn every_cut_is_an_error() {
    let bytes = good().bytes();
    for len in 0..bytes.len() {
        let cut = Header::parse(Path::new("cut.gguf"), &bytes[..len]);
        let said = cut.expect_err("a cut file").to_string();
        assert!(
            said.starts_with("cut.gguf: not a whole GGUF file: "),
            "{said}"
        );
    }
}

#[test]
fn broken_files_are_refused_by_name() {
    let changed = |change: &dyn Fn(&mut File)| {
        let mut file = good();
        change(&mut file);
        parse(&file).expect_err("a broken file").to_string()
    };
    let huge = u64::MAX.to_le_bytes();
    type Change<'a> = &'a dyn Fn(&mut File);
    let cases: &[(Change, &str)] = &[
        (&|f| f.magic = *b"GGML", "begin with"),
        (&|f| f.version = 2, "version 2"),
        (&|f| f.version = 3u32.swap_bytes(), "big-endian"),
        (
            &|f| f.n_tensors = Some(u64::MAX),
            "18446744073709551615 tensors",
        ),
        (&|f| f.n_metadata = Some(1 << 60), "metadata"),
        (
            &|f| f.tensors[0].shape = vec![1 << 31, 1 << 31, 1 << 31],
            "overflows",
        ),
        (
            &|f| f.tensors[0].shape = vec![1 << 32],
            "extent of 4294967296",
        ),
        (&|f| f.tensors[0].shape = vec![0, 2], "extent of 0"),
        (&|f| f.tensors[0].shape = vec![], "0 extents"),
        (&|f| f.tensors[0].shape = vec![1; 5], "5 extents"),
        (&|f| f.tensors[1].shape = vec![48, 2], "rows of 48 elements"),
        (
            &|f| f.tensors[0].shape = vec![1 << 30],
            "past the file's end",
        ),
        (&|f| f.tensors[0].ty = 13, "13 (Q5_K)"),
        (&|f| f.tensors[0].ty = 4, "type 4 is not"),
        (&|f| f.tensors[0].offset = 8, "alignment"),
        (
            &|f| f.tensors[0].offset = u64::MAX - 31,
            "past the file's end",
        ),
        (&|f| f.tensors[1].offset = 0, "overlap"),
        (&|f| f.tensors[1].name = "a".into(), "a is there twice"),
        (&|f| f.tensors[1].name = "".into(), "0 bytes"),
        (&|f| f.metadata[1].0 = "v.0".into(), "v.0 is there twice"),
        (&|f| f.metadata[0].1 = value(13, &[]), "type 13 of values"),
        (&|f| f.metadata[0].1 = value(7, &[2]), "a bool is 2"),
        (
            &|f| f.metadata[0].1 = value(8, &huge),
            "takes 18446744073709551615",
        ),
        (
            &|f| f.metadata[0].1 = value(8, &[&[1, 0, 0, 0, 0, 0, 0, 0, 0xff][..]].concat()),
            "UTF-8",
        ),
        (
            &|f| f.metadata[0].1 = value(9, &[&4u32.to_le_bytes()[..], &huge].concat()),
            "elements of an array",
        ),
        (
            &|f| f.metadata[0].1 = value(9, &[&77u32.to_le_bytes()[..], &huge].concat()),
            "type 77",
        ),
        (
            &|f| {
                let mut deep = array(4, &[]);
                for _ in 0..50 {
                    deep = value(
                        9,
                        &[&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &deep[4..]].concat(),
                    );
                }
                f.metadata[0].1 = deep;
            },
            "more than 4 deep",
        ),
        (
            &|f| {
                f.metadata
                    .push(("general.alignment".into(), value(4, &48u32.to_le_bytes())))
            },
            "general.alignment",
        ),
        (
            &|f| {
                f.metadata
                    .push(("general.alignment".into(), value(4, &0u32.to_le_bytes())))
            },
            "general.alignment",
        ),
    ];
    for (ix, (change, word)) in cases.iter().enumerate() {
        let said = changed(*change);
        assert!(said.contains(word), "case {ix}, {word}: {said}");
    }
    // 17 million bools: whole, but more than a header may keep.
    let flags = [
        &7u32.to_le_bytes()[..],
        &(17u64 << 20).to_le_bytes(),
        &vec![0; 17 << 20],
    ]
    .concat();
    let said = parse(&File::new().with("flags", value(9, &flags))).unwrap_err();
    assert!(said.to_string().contains("16777216 values"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..Default::default() })]
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((0usize..900, any::<u8>()), 1..6)) {
        let mut bytes = good().bytes();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(Path::new("x"), &bytes) {
            for info in header.tensors.values() {
                info.blocks.expand(&bytes[info.range.clone()]);
            }
        }
    }
}

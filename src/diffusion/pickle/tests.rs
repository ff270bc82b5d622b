//! Checkpoints that torch has written, checkpoints that want something done, and damaged ones.

use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::*;
use zip::CompressionMethod;

use super::{PickleError, is_torch, read};
use crate::damage::{damage, damaged};
use crate::diffusion::Weights;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/checkpoints")
        .join(name)
}

const CHECKPOINTS: [&str; 4] = [
    "plain.ckpt",
    "lightning.ckpt",
    "protocol4.ckpt",
    "legacy.ckpt",
];

/// An archive as torch writes it.
fn archive(pickle: &[u8], storages: &[&[u8]], method: CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    let mut put = |name: String, content: &[u8]| {
        writer.start_file(name, options).expect("started");
        writer.write_all(content).expect("written");
    };
    put("archive/data.pkl".to_owned(), pickle);
    for (index, storage) in storages.iter().enumerate() {
        put(format!("archive/data/{index}"), storage);
    }
    writer.finish().expect("finished").into_inner()
}

fn stored(pickle: &[u8]) -> Vec<u8> {
    archive(pickle, &[&[0; 16]], CompressionMethod::Stored)
}

/// A pickle of `{"w": …}` whose tensor has these numbers, each below 256; its storage claims four floats.
fn tensor(offset: u8, shape: [u8; 2], strides: [u8; 2]) -> Vec<u8> {
    let mut pickle = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    pickle.extend(b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0\x30X\x03\0\0\0cpuK\x04tQ");
    pickle.extend([b'K', offset]);
    for [a, b] in [shape, strides] {
        pickle.extend([b'K', a, b'K', b, 0x86]);
    }
    pickle.extend(b"\x89NtRs.");
    pickle
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes).expect_err("refused").to_string()
}

#[test]
fn every_tensor_of_torch_is_found_with_its_numbers() {
    let expected = Weights::open(&[fixture("expected.safetensors")]).expect("a fixture");
    for name in CHECKPOINTS {
        let found = Weights::open(&[fixture(name)]).expect(name);
        for (key, shape, dtype) in expected.stored() {
            if name == "legacy.ckpt" && key.starts_with('e') && key != "empty" {
                continue; // older than 8 bits
            }
            assert_eq!(found.stored_shape(key), Some(shape), "{name} {key}");
            if key == "ids" {
                let bytes = |weights: &Weights| weights.read_bytes(key).map(|(b, ..)| b.to_vec());
                assert_eq!(bytes(&found).ok(), bytes(&expected).ok());
                continue;
            }
            let bits = |weights: &Weights| -> Vec<u32> {
                let (values, _) = weights.read_f32(key).expect(key);
                values.into_iter().map(f32::to_bits).collect()
            };
            assert_eq!(bits(&found), bits(&expected), "{name} {key} {dtype:?}");
        }
        let steps = found.metadata().get("global_step").map(String::as_str);
        assert_eq!(steps, (name != "plain.ckpt").then_some("470000"));
    }
}

/// In torch a view costs nothing; here it is put together as it is read, and digests do not see the difference.
#[test]
fn a_digest_does_not_depend_on_the_container() {
    let digest = |name: &str| Weights::open(&[fixture(name)]).expect(name).digest();
    assert_eq!(digest("plain.ckpt"), digest("expected.safetensors"));
    assert_eq!(digest("lightning.ckpt"), digest("expected.safetensors"));
}

#[test]
fn what_a_pickle_calls_is_never_called() {
    let cases: [(&str, &[u8]); 9] = [
        ("os.system", b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R."),
        (
            "posix.system",
            b"\x80\x02cposix\nsystem\nX\x02\0\0\0id\x85R.",
        ),
        (
            "builtins.eval",
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        ),
        (
            "builtins.exec",
            b"\x80\x02(X\x01\0\0\x001ibuiltins\nexec\n.",
        ),
        ("os.system", b"\x80\x02(cos\nsystem\nX\x02\0\0\0ido."),
        (
            "subprocess.Popen",
            b"\x80\x02csubprocess\nPopen\nX\x02\0\0\0id\x85\x81.",
        ),
        (
            "subprocess.Popen",
            b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93)}\x92.",
        ),
        // The state of a class.
        ("builtins.object", b"\x80\x02cbuiltins\nobject\n}b."),
        // What rebuilds tensors may not rebuild anything else.
        (
            "os.system",
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN)Nt\x52.",
        ),
    ];
    for (name, pickle) in cases {
        let error = read(&stored(pickle)).expect_err(name);
        assert!(
            matches!(&error, PickleError::Forbidden(found) if found == name),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains(name) && text.contains("safetensors"),
            "{text}"
        );
    }
    // Having a name is no harm: it is only a key.
    let named = b"\x80\x02}(cos\nsystem\nK\x01u.";
    assert!(read(&stored(named)).expect("inert").tensors.is_empty());
}

#[test]
fn tensors_stay_inside_of_their_storage() {
    let whole = read(&stored(&tensor(0, [2, 2], [2, 1]))).expect("right");
    assert_eq!(whole.tensors["w"].shape, [2, 2]);
    assert_eq!(whole.tensors["w"].axes, None);
    let turned = read(&stored(&tensor(0, [2, 2], [1, 2]))).expect("right");
    assert_eq!(turned.tensors["w"].axes, Some(vec![(2, 1), (2, 2)]));
    for (what, pickle) in [
        ("ends outside", tensor(1, [2, 2], [2, 1])),
        ("ends outside", tensor(0, [2, 2], [200, 1])),
        ("has 25 elements", tensor(0, [5, 5], [0, 0])),
    ] {
        let text = refusal(&stored(&pickle));
        assert!(text.contains("`w`") && text.contains(what), "{text}");
    }
    let short = archive(
        &tensor(0, [2, 2], [2, 1]),
        &[&[0; 12]],
        CompressionMethod::Stored,
    );
    assert!(refusal(&short).contains("claims 4 elements and has 3"));
    let none = archive(&tensor(0, [2, 2], [2, 1]), &[], CompressionMethod::Stored);
    assert!(refusal(&none).contains("`data/0` that is not in the archive"));
}

#[test]
fn archives_that_unpack_are_refused() {
    let zeros = vec![0; 1 << 20];
    let bomb = archive(
        &tensor(0, [2, 2], [2, 1]),
        &[&zeros],
        CompressionMethod::Deflated,
    );
    assert!(bomb.len() < 10_000);
    assert!(refusal(&bomb).contains("compressed"));
    let mut other = archive(b"", &[], CompressionMethod::Stored);
    while let Some(at) = other.windows(8).position(|window| window == b"data.pkl") {
        other[at..at + 8].copy_from_slice(b"data.txt");
    }
    assert!(refusal(&other).contains("no `data.pkl`"));
}

#[test]
fn a_pickle_cannot_grow_beyond_its_limits() {
    let repeated = |start: &[u8], part: &[u8], count: usize| {
        let mut pickle = [b"\x80\x02", start].concat();
        pickle.extend(part.repeat(count));
        pickle.push(b'.');
        stored(&pickle)
    };
    assert!(refusal(&repeated(b"", b"N0", 2_000_000)).contains("values"));
    assert!(refusal(&repeated(b"", b"N", 100_000)).contains("stack"));
    assert!(refusal(&repeated(b"", b"(", 100_000)).contains("marks"));
    // A dictionary of the same long list, again and again.
    let mut list = b"](".to_vec();
    list.extend(b"K\x01K\x02\x86".repeat(20_000));
    list.extend(b"e");
    list.extend(b"q\0");
    let copies = b"ccollections\nOrderedDict\nh\0\x85R0".repeat(100);
    assert!(refusal(&repeated(&[list, copies].concat(), b"N", 1)).contains("in dictionaries"));
    // A text of four gigabytes.
    assert!(refusal(&repeated(b"X\xff\xff\xff\xff", b"", 1)).contains("4294967295 bytes"));
    assert!(refusal(&stored(&vec![b'N'; 17 << 20])).contains("at most 16777216"));
}

#[test]
fn damage_is_named() {
    for (text, pickle) in [
        ("ends early", &b"\x80\x02}"[..]),
        ("empty stack", b"\x80\x020."),
        ("empty stack", b"\x80\x02N(0."),
        ("protocol 0", b"\x80\x00."),
        ("opcode 0x49", b"\x80\x02I1\n."),
        ("was not kept", b"\x80\x02h\x05."),
        ("no dictionary", b"\x80\x02]."),
        ("no storage", b"\x80\x02X\x01\0\0\0aQ."),
        ("what is no name", b"\x80\x02K\x01)R."),
        ("without a value", b"\x80\x02}(Nu."),
    ] {
        let found = refusal(&stored(pickle));
        assert!(found.contains(text), "{found}, not {text}");
    }
    for name in CHECKPOINTS {
        let whole = std::fs::read(fixture(name)).expect("a fixture");
        for length in [5, 20, 100, whole.len() / 2, whole.len() - 1] {
            let cut = &whole[..length];
            assert!(!is_torch(cut) || read(cut).is_err(), "{name} {length}");
        }
    }
}

/// What was found lies in the file, whatever the file says; nothing has panicked.
fn check(bytes: &[u8]) {
    let Ok(found) = read(bytes) else {
        return;
    };
    for placed in found.tensors.values() {
        assert!(placed.bytes.start <= placed.bytes.end && placed.bytes.end <= bytes.len());
        let size = super::element_bytes(placed.dtype);
        match &placed.axes {
            None => {
                let count: usize = placed.shape.iter().product();
                assert_eq!(placed.bytes.len(), count * size);
            }
            Some(axes) => {
                let bytes = &bytes[placed.bytes.clone()];
                crate::diffusion::formats::gather(bytes, axes, size);
            }
        }
    }
}

fn whole_files() -> Vec<Vec<u8>> {
    let read = |name: &&str| std::fs::read(fixture(name)).expect("a fixture");
    CHECKPOINTS.iter().map(read).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_checkpoints_do_no_harm(which in 0..4_usize, all in vec(damage(), 1..6)) {
        check(&damaged(&whole_files()[which], &all));
    }

    /// The pickle alone, in a sound archive: damage comes past the directory.
    #[test]
    fn damaged_pickles_do_no_harm(which in 0..3_usize, all in vec(damage(), 1..6)) {
        let whole = &whole_files()[which];
        let archive_of = super::archive::Archive::read(whole).expect("sound");
        let pickle = damaged(archive_of.pickle().expect("there"), &all);
        let floats = [0; 64];
        let storages: Vec<&[u8]> = vec![&floats; 16];
        check(&archive(&pickle, &storages, CompressionMethod::Stored));
    }

    #[test]
    fn random_pickles_do_no_harm(pickle in vec(any::<u8>(), 0..400)) {
        check(&stored(&[b"\x80\x02", pickle.as_slice()].concat()));
        check(&[b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", pickle.as_slice()].concat());
        check(&[b"PK\x03\x04", pickle.as_slice()].concat());
    }

    /// Opcodes in an order that nobody has thought of.
    #[test]
    fn shuffled_opcodes_do_no_harm(parts in vec(proptest::sample::select(OPCODES.to_vec()), 0..60)) {
        let mut pickle = b"\x80\x02".to_vec();
        for part in parts {
            pickle.extend(part);
        }
        pickle.push(b'.');
        check(&stored(&pickle));
    }
}

const OPCODES: [&[u8]; 34] = [
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"u",
    b"s",
    b"e",
    b"a",
    b"R",
    b"b",
    b"Q",
    b"N",
    b"0",
    b"1",
    b"2",
    b"q\0",
    b"h\0",
    b"q\x01",
    b"h\x01",
    b"\x94",
    b"\x85",
    b"\x86",
    b"\x87",
    b"K\x04",
    b"X\x01\0\0\0w",
    b"X\x07\0\0\0storage",
    b"ctorch\nFloatStorage\n",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"X\x0a\0\0\0state_dict",
    b"d",
    b"\x81",
];

//! What is unpacked, what is refused, and that nothing breaks the reader.

use super::*;
use ::zip::write::SimpleFileOptions;
use std::io::Write as _;

fn archive(write: impl FnOnce(&mut ::zip::ZipWriter<File>)) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut zip = ::zip::ZipWriter::new(file.reopen().expect("the file"));
    write(&mut zip);
    zip.finish().expect("finished");
    file
}

fn add(zip: &mut ::zip::ZipWriter<File>, name: &str, content: &[u8]) {
    zip.start_file(name, SimpleFileOptions::default())
        .expect("started");
    zip.write_all(content).expect("written");
}

/// An entry's name, and its content or why it was left out.
type Found = (String, Result<Vec<u8>, &'static str>);

fn unpacked(file: &tempfile::NamedTempFile, limits: &Limits) -> Result<Vec<Found>, ArchiveError> {
    let folder = tempfile::tempdir().expect("a folder");
    let kind = Kind::of(&std::fs::read(file.path()).expect("readable"));
    let kind = kind.unwrap_or(Kind::Zip); // damaged
    let mut budget = Budget::of(file.path(), limits)?;
    let entries = unpack(kind, file.path(), folder.path(), &mut budget)?;
    let read = |entry: Entry| match entry.content {
        Ok((_, path)) => {
            assert_eq!(path.parent(), Some(folder.path()));
            (entry.name, Ok(std::fs::read(path).expect("unpacked")))
        }
        Err(error) => (entry.name, Err(error.code())),
    };
    Ok(entries.into_iter().map(read).collect())
}

#[test]
fn hostile_entries_are_named_and_the_others_kept() {
    let file = archive(|zip| {
        add(zip, "../evil.png", b"1");
        add(zip, "/etc/evil.png", b"2");
        zip.add_directory("10_a", SimpleFileOptions::default())
            .expect("added");
        add(zip, "10_a/good.png", b"good");
        zip.add_symlink("10_a/link.png", "/etc/passwd", SimpleFileOptions::default())
            .expect("added");
    });
    let found = unpacked(&file, &Limits::default()).expect("readable");
    let expected = [
        ("../evil.png", Err("unsafe_path")),
        ("/etc/evil.png", Err("unsafe_path")),
        ("10_a/good.png", Ok(b"good".to_vec())),
        ("10_a/link.png", Err("symlink")),
    ];
    assert_eq!(
        found,
        expected.map(|(name, content)| (name.to_owned(), content))
    );
}

#[test]
fn limits_hold() {
    let file = archive(|zip| {
        add(zip, "a", &[0; 1000]);
        add(zip, "b", &[0; 1000]);
    });
    let refused = |limits: Limits| unpacked(&file, &limits).expect_err("refused").code();
    assert_eq!(
        refused(Limits {
            files: 1,
            ..Limits::default()
        }),
        "too_many_files"
    );
    assert_eq!(
        refused(Limits {
            unpacked_bytes: 1999,
            ..Limits::default()
        }),
        "unpacks_too_large"
    );
    assert_eq!(
        refused(Limits {
            archive_bytes: 10,
            ..Limits::default()
        }),
        "too_large"
    );
    let small = unpacked(
        &file,
        &Limits {
            image_bytes: 999,
            ..Limits::default()
        },
    )
    .expect("readable");
    assert!(
        small
            .iter()
            .all(|(_, content)| *content == Err("too_large"))
    );

    let bomb = archive(|zip| {
        zip.start_file("zeros", SimpleFileOptions::default())
            .expect("started");
        for _ in 0..65 {
            zip.write_all(&vec![0; 1 << 20]).expect("written");
        }
    });
    let error = unpacked(&bomb, &Limits::default()).expect_err("refused");
    assert!(matches!(error, ArchiveError::Ratio { .. }), "{error}");
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    let file = archive(|zip| {
        add(
            zip,
            "a.png",
            b"some content that is long enough to be compressed, compressed, compressed",
        );
        add(zip, "b.png", b"other");
    });
    let bytes = std::fs::read(file.path()).expect("readable");
    let cut = tempfile::NamedTempFile::new().expect("a file");
    for keep in 0..bytes.len() {
        std::fs::write(cut.path(), &bytes[..keep]).expect("written");
        assert!(unpacked(&cut, &Limits::default()).is_err(), "cut at {keep}");
    }
    for at in 0..bytes.len() {
        let mut wrong = bytes.clone();
        wrong[at] ^= 0xff;
        std::fs::write(cut.path(), &wrong).expect("written");
        let _ = unpacked(&cut, &Limits::default());
    }
}

fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bytes).expect("written");
    file
}

/// A tar by hand: what a writer would refuse to make, too.
fn tar_entry(name: &[u8], kind: u8, content: &[u8]) -> Vec<u8> {
    let mut header = ::tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name);
    header.set_entry_type(::tar::EntryType::new(kind));
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn tar(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend([0; 1024]);
    bytes
}

/// As `gzip` writes it: through the zip writer, whose streams are the same.
fn gzip(content: &[u8]) -> Vec<u8> {
    let file = archive(|zip| add(zip, "-", content));
    let zip = std::fs::read(file.path()).expect("readable");
    let long = |at: usize| u32::from_le_bytes(zip[at..at + 4].try_into().expect("four"));
    let directory = zip
        .windows(4)
        .rposition(|w| w == b"PK\x01\x02")
        .expect("one");
    let begin = 30 + 1 + usize::from(u16::from_le_bytes([zip[28], zip[29]]));
    let packed = long(directory + 20) as usize;
    let mut bytes = b"\x1f\x8b\x08\x08\0\0\0\0\0\x03name.tar\0".to_vec();
    bytes.extend(&zip[begin..begin + packed]);
    bytes.extend(crc32fast::hash(content).to_le_bytes());
    bytes.extend((content.len() as u32).to_le_bytes());
    bytes
}

#[test]
fn hostile_entries_of_a_tar_are_named_and_the_others_kept() {
    let long = "10_a/".to_owned() + &"x".repeat(150) + ".png";
    let pax = format!("{} path={long}\n", long.len() + 10);
    let bytes = tar(&[
        tar_entry(b"../evil.png", b'0', b"1"),
        tar_entry(b"/etc/evil.png", b'0', b"2"),
        tar_entry(b"10_a/", b'5', b""),
        tar_entry(b"10_a/good.png", b'0', b"good"),
        tar_entry(b"10_a/link.png", b'2', b""),
        tar_entry(b"10_a/hard.png", b'1', b""),
        tar_entry(b"10_a/pipe.png", b'6', b""),
        tar_entry(b"././@LongLink", b'L', format!("{long}\0").as_bytes()),
        tar_entry(b"short", b'0', b"gnu"),
        tar_entry(b"PaxHeaders/x", b'x', pax.as_bytes()),
        tar_entry(b"short", b'0', b"pax"),
    ]);
    let found = unpacked(&written(&bytes), &Limits::default()).expect("readable");
    let expected = [
        ("../evil.png", Err("unsafe_path")),
        ("/etc/evil.png", Err("unsafe_path")),
        ("10_a/good.png", Ok(b"good".to_vec())),
        ("10_a/link.png", Err("symlink")),
        ("10_a/hard.png", Err("symlink")),
        ("10_a/pipe.png", Err("not_a_file")),
        (&long, Ok(b"gnu".to_vec())),
        (&long, Ok(b"pax".to_vec())),
    ];
    assert_eq!(
        found,
        expected.map(|(name, content)| (name.to_owned(), content))
    );
}

#[test]
fn a_name_of_a_tar_cannot_fill_the_memory() {
    let bytes = tar(&[tar_entry(b"././@LongLink", b'L', &vec![b'x'; 1 << 20])]);
    let error = unpacked(&written(&bytes), &Limits::default()).expect_err("refused");
    assert_eq!(error.code(), "damaged");
}

#[test]
fn gzip_holds_one_file_whose_checksum_counts() {
    let content = tar(&[tar_entry(b"a.png", b'0', b"good")]);
    let mut bytes = gzip(&content);
    let found = unpacked(&written(&bytes), &Limits::default()).expect("readable");
    assert_eq!(found, [("content.tar".to_owned(), Ok(content))]);
    let checksum = bytes.len() - 8;
    bytes[checksum] ^= 1;
    let error = unpacked(&written(&bytes), &Limits::default()).expect_err("refused");
    assert_eq!(error.code(), "damaged");
    let bomb = gzip(&vec![0; 80 << 20]);
    let error = unpacked(&written(&bomb), &Limits::default()).expect_err("refused");
    assert_eq!(error.code(), "unpacks_too_large", "{error}");
}

#[test]
fn damaged_tars_and_gzips_are_errors_and_never_panics() {
    let content = tar(&[
        tar_entry(b"a.png", b'0', &[7; 700]),
        tar_entry(b"b.png", b'0', b"other"),
    ]);
    let cut = tempfile::NamedTempFile::new().expect("a file");
    for bytes in [gzip(&content), content] {
        for keep in (0..bytes.len()).step_by(7) {
            std::fs::write(cut.path(), &bytes[..keep]).expect("written");
            let _ = unpacked(&cut, &Limits::default());
        }
        for at in (0..bytes.len()).step_by(3) {
            let mut wrong = bytes.clone();
            wrong[at] ^= 0xff;
            std::fs::write(cut.path(), &wrong).expect("written");
            let _ = unpacked(&cut, &Limits::default());
        }
    }
}

//! The first half of an upload: files on disk become checked images with captions. Blocks; touches no rows.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::archive::{self, Budget};
use super::captions::{self, Caption};
use super::group::{Group, Member, Spot};
use super::layout::Place;
use super::limits::Limits;
use super::masks;
use super::pictures::{self, Picture};
use super::report::{FileKind, FileReport, Outcome, Remark};
use super::trial::Trial;
use crate::pictures::Background;

pub use super::target::{DEFAULT_SUBSET, SubsetChoice, Target};

/// One uploaded file, already on disk.
#[derive(Debug)]
pub struct StagedFile {
    /// The name the client gave; it may have folders in it.
    pub name: String,
    pub path: PathBuf,
}

/// What files are checked with.
#[derive(Clone, Copy, Debug)]
pub struct Checks<'a> {
    pub limits: &'a Limits,
    pub trial: Option<&'a Trial>,
}

/// What the second half has to store.
#[derive(Debug, Default)]
pub struct Prepared {
    pub images: Vec<PreparedImage>,
    /// Captions whose image is not in this upload; perhaps the dataset has it.
    pub orphans: Vec<PreparedCaption>,
    /// One per file; those of `images` and `orphans` are filled in when they are stored.
    pub files: Vec<FileReport>,
}

#[derive(Debug)]
pub struct PreparedImage {
    /// Its index in [`Prepared::files`].
    pub report: usize,
    pub path: PathBuf,
    pub file_name: String,
    pub target: Target,
    pub picture: Picture,
    pub background: Option<Background>,
    /// Of a file of its own; it may be that of several images.
    pub caption: Option<PreparedCaption>,
    /// Of a table, where there is no file.
    pub listed_caption: Option<String>,
    pub mask: Option<PreparedMask>,
}

/// A mask, a grey PNG by now.
#[derive(Debug)]
pub struct PreparedMask {
    /// Its index in [`Prepared::files`].
    pub report: usize,
    pub path: PathBuf,
}

impl PreparedImage {
    /// The caption's text, wherever it is from.
    pub fn caption_text(&self) -> Option<String> {
        let of_file = self.caption.as_ref().map(|caption| caption.text.clone());
        of_file.or_else(|| self.listed_caption.clone())
    }
}

#[derive(Clone, Debug)]
pub struct PreparedCaption {
    /// Its index in [`Prepared::files`].
    pub report: usize,
    pub stem: String,
    pub target: Target,
    pub text: String,
}

/// Checks everything that was uploaded. `scratch` is a folder of this upload for unpacked archives.
///
/// # Errors
/// Only when the disk fails; what is wrong with a file is in its report.
pub fn prepare(
    uploaded: Vec<StagedFile>,
    choice: &SubsetChoice,
    scratch: &Path,
    checks: Checks<'_>,
) -> io::Result<Prepared> {
    let mut files = Vec::new();
    let mut loose = Group::default();
    let mut groups = Vec::new();
    for file in uploaded {
        if let Some(kind) = archive::Kind::of(&head(&file.path)?) {
            let mut unpacking = Unpacking {
                scratch,
                limits: checks.limits,
                files: &mut files,
                group: Group::default(),
            };
            unpacking.begin(file, kind)?;
            groups.push(unpacking.group);
        } else {
            match Place::parse(&file.name) {
                Ok(place) => loose.add(&mut files, file.name, place, file.path)?,
                Err(error) => files.push(FileReport::refused(
                    file.name,
                    FileKind::Other,
                    "unsafe_path",
                    error,
                )),
            }
        }
    }
    groups.push(loose);
    let mut members = Vec::new();
    for group in groups {
        members.extend(group.assign(choice, checks.limits, &mut files));
    }
    Ok(check(members, files, choice, checks))
}

/// An archive with those inside of it.
struct Unpacking<'a> {
    scratch: &'a Path,
    limits: &'a Limits,
    files: &'a mut Vec<FileReport>,
    group: Group,
}

/// An archive on its way.
struct Found {
    name: String,
    path: PathBuf,
    kind: archive::Kind,
    /// The folder that it lies in.
    folders: Vec<String>,
    depth: usize,
}

impl Unpacking<'_> {
    fn begin(&mut self, file: StagedFile, kind: archive::Kind) -> io::Result<()> {
        let mut budget = match Budget::of(&file.path, self.limits) {
            Ok(budget) => budget,
            Err(error) => return self.refuse(file.name, error),
        };
        let found = Found {
            name: file.name,
            path: file.path,
            kind,
            folders: Vec::new(),
            depth: 1,
        };
        self.unpack(found, "", &mut budget)
    }

    /// `prefix` is what the names of its entries are reported with.
    fn unpack(&mut self, found: Found, prefix: &str, budget: &mut Budget) -> io::Result<()> {
        if found.depth > self.limits.archive_depth {
            let error = archive::ArchiveError::TooDeep(self.limits.archive_depth);
            return self.refuse(found.name, error);
        }
        let folder = tempfile::Builder::new()
            .prefix("archive-")
            .tempdir_in(self.scratch)?
            .keep(); // gone with `scratch`
        let entries = match archive::unpack(found.kind, &found.path, &folder, budget) {
            Ok(entries) => entries,
            Err(error) => {
                std::fs::remove_dir_all(&folder)?; // what was unpacked by then may be large
                return self.refuse(found.name, error);
            }
        };
        std::fs::remove_file(&found.path)?; // a large archive need not lie beside its content
        if found.kind == archive::Kind::Gzip {
            return self.unpacked_gzip(found, entries, prefix, budget);
        }
        self.files
            .push(FileReport::new(found.name, FileKind::Archive, TAKEN));
        for entry in entries {
            let name = format!("{prefix}{}", entry.name);
            match entry.content {
                Ok((place, path)) => {
                    let place = place.within(&found.folders);
                    self.take(name, place, path, found.depth, budget)?;
                }
                Err(error) => self.files.push(FileReport::refused(
                    name,
                    FileKind::Other,
                    error.code(),
                    error,
                )),
            }
        }
        Ok(())
    }

    /// One file of an archive, which may be an archive.
    fn take(
        &mut self,
        name: String,
        place: Place,
        path: PathBuf,
        depth: usize,
        budget: &mut Budget,
    ) -> io::Result<()> {
        let kind = archive::Kind::of(&head(&path)?).filter(|_| !place.is_litter());
        let Some(kind) = kind else {
            return self.group.add(self.files, name, place, path);
        };
        let prefix = format!("{name}/");
        let inner = Found {
            name,
            path,
            kind,
            folders: place.folders,
            depth: depth + 1,
        };
        self.unpack(inner, &prefix, budget)
    }

    /// What a gzip file holds is that file: it has the name of the outer one.
    fn unpacked_gzip(
        &mut self,
        found: Found,
        entries: Vec<archive::Entry>,
        prefix: &str,
        budget: &mut Budget,
    ) -> io::Result<()> {
        for entry in entries {
            let Ok((_, path)) = entry.content else {
                continue; // the reader refuses the whole instead
            };
            let Some(kind) = archive::Kind::of(&head(&path)?) else {
                let message = "found a gzip file that holds no archive, expected a tar in it";
                self.files.push(FileReport::refused(
                    &found.name,
                    FileKind::Archive,
                    "not_an_image",
                    message,
                ));
                continue;
            };
            let inner = Found {
                name: found.name.clone(),
                path,
                kind,
                folders: found.folders.clone(),
                depth: found.depth + 1,
            };
            self.unpack(inner, prefix, budget)?;
        }
        Ok(())
    }

    fn refuse(&mut self, name: String, error: archive::ArchiveError) -> io::Result<()> {
        match error {
            archive::ArchiveError::Io(error) => Err(error),
            error => {
                let code = error.code();
                self.files
                    .push(FileReport::refused(name, FileKind::Archive, code, error));
                Ok(())
            }
        }
    }
}

const TAKEN: Outcome = Outcome::Accepted {
    image_id: None,
    subset: None,
};

/// Decodes every image on all cores, reads every caption, and brings the two together by folder and stem.
fn check(
    members: Vec<Member>,
    mut files: Vec<FileReport>,
    choice: &SubsetChoice,
    checks: Checks<'_>,
) -> Prepared {
    let limits = checks.limits;
    let (images, captions): (Vec<_>, Vec<_>) = members
        .into_iter()
        .partition(|member| member.kind == FileKind::Image);
    let mut by_stem = HashMap::new();
    let mut used_stems = HashMap::new();
    for member in captions {
        let key = member.key();
        match read_caption(&member.path, limits) {
            Ok(caption) => {
                if let Some(first) = used_stems.get(&key) {
                    let message = format!("`{first}` has the caption of the same image already");
                    refuse(&mut files[member.report], "second_caption", message);
                    continue;
                }
                used_stems.insert(key.clone(), files[member.report].name.clone());
                files[member.report].remarks = caption
                    .remarks
                    .iter()
                    .map(|r| Remark::new(r.code(), r))
                    .collect();
                let stem = member.place.stem().to_owned();
                by_stem.insert(
                    key,
                    PreparedCaption {
                        report: member.report,
                        stem,
                        target: member.target,
                        text: caption.text,
                    },
                );
            }
            Err(remark) => refuse(&mut files[member.report], remark.code, remark.message),
        }
    }
    let (masks, images) = apart(images, &mut files);
    let pictures: Vec<_> = images
        .par_iter()
        .map(|member| pictures::check(&member.path, limits, checks.trial))
        .collect();
    let mut masks: Vec<Option<Mask>> = (images.par_iter().zip(&pictures))
        .map(|(member, picture)| {
            let mask = masks.get(&member.spot())?;
            let picture = picture.as_ref().ok()?; // without an image its mask is refused below
            Some(Mask::make(mask, picture, checks))
        })
        .collect();
    let mut prepared = Prepared::default();
    let mut used = HashSet::new();
    for (index, (member, picture)) in images.into_iter().zip(pictures).enumerate() {
        match picture {
            Ok(mut picture) => {
                let mask = masks[index].take().and_then(|mask| mask.settle(&mut files));
                let remarks = &mut files[member.report].remarks;
                remarks.append(&mut picture.remarks);
                if picture.has_alpha {
                    remarks.push(transparent(choice.background));
                }
                let key = member.key();
                let caption = by_stem.get(&key).cloned(); // `a.png` and `a.jpg` share `a.txt`, as in sd-scripts
                used.extend(caption.as_ref().map(|caption| caption.report));
                prepared.images.push(PreparedImage {
                    report: member.report,
                    path: member.path,
                    file_name: member.place.file_name,
                    target: member.target,
                    background: choice.background.filter(|_| picture.has_alpha),
                    picture,
                    listed_caption: member.listed_caption.filter(|_| caption.is_none()),
                    caption,
                    mask,
                });
            }
            Err(error) => refuse(&mut files[member.report], error.code(), error.to_string()),
        }
    }
    by_stem.retain(|_, caption| !used.contains(&caption.report));
    prepared.orphans = by_stem.into_values().collect();
    prepared.orphans.sort_by_key(|caption| caption.report);
    prepared.files = files;
    prepared
}

/// Masks by the images that they are of, and the images. A mask without an image is an image.
fn apart(images: Vec<Member>, files: &mut [FileReport]) -> (HashMap<Spot, Member>, Vec<Member>) {
    let spots: HashSet<Spot> = images.iter().map(Member::spot).collect();
    let mut masks: HashMap<Spot, Member> = HashMap::new();
    let mut others = Vec::with_capacity(images.len());
    for member in images {
        let Some(spot) = member.mask_of().filter(|spot| spots.contains(spot)) else {
            others.push(member);
            continue;
        };
        let file = &mut files[member.report];
        file.kind = FileKind::Mask;
        // Overwritten when the image is there.
        refuse(
            file,
            "no_image",
            "the image that it is the mask of was refused",
        );
        match masks.entry(spot) {
            Entry::Vacant(place) => _ = place.insert(member),
            Entry::Occupied(_) => {
                let message = "another file is the mask of the same image already";
                refuse(file, "second_mask", message);
            }
        }
    }
    (masks, others)
}

/// A mask after its check.
struct Mask {
    report: usize,
    made: Result<PathBuf, Remark>,
}

impl Mask {
    /// In place of the file that came. Images that share a stem share a mask, each at its own path.
    fn make(member: &Member, picture: &Picture, checks: Checks<'_>) -> Self {
        let size = (picture.width_px, picture.height_px);
        let png = masks::make(&member.path, size, checks.limits, checks.trial);
        let made = png
            .map_err(|error| Remark::new(error.code(), error))
            .and_then(|png| {
                let path = member.path.with_extension(&picture.sha256);
                let written = std::fs::write(&path, png);
                written.map_err(|error| Remark::new("not_stored", error))?;
                Ok(path)
            });
        Self {
            report: member.report,
            made,
        }
    }

    fn settle(self, files: &mut [FileReport]) -> Option<PreparedMask> {
        let report = self.report;
        match self.made {
            Ok(path) => Some(PreparedMask { report, path }),
            Err(remark) => {
                refuse(&mut files[report], remark.code, remark.message);
                None
            }
        }
    }
}

pub(super) fn refuse(file: &mut FileReport, code: &'static str, message: impl Into<String>) {
    file.outcome = Outcome::Refused(Remark {
        code,
        message: message.into(),
    });
}

fn read_caption(path: &Path, limits: &Limits) -> Result<Caption, Remark> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limits.caption_bytes + 1).read_to_end(&mut bytes))
        .map_err(|error| Remark::new("unreadable", error))?;
    if bytes.len() as u64 > limits.caption_bytes {
        let message = format!("the caption is larger than {} bytes", limits.caption_bytes);
        return Err(Remark::new("too_large", message));
    }
    captions::read(&bytes).map_err(|error| Remark::new("not_text", error))
}

/// Enough of a file to tell what it is.
pub(super) fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let bytes = archive::Kind::HEAD_BYTES as u64;
    File::open(path)?.take(bytes).read_to_end(&mut head)?;
    Ok(head)
}

fn transparent(background: Option<Background>) -> Remark {
    let message = match background {
        Some(colour) => format!("parts are transparent; they are laid on {colour}"),
        None => "parts are transparent; alpha is dropped, as sd-scripts does, and what colour lies under it is used \
                 (give `background` to lay them on a colour)"
            .to_owned(),
    };
    Remark::new("transparent", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn png() -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(4, 3)
            .write_to(&mut bytes, image::ImageFormat::Png)
            .expect("an encoder");
        bytes.into_inner()
    }

    fn prepared(uploaded: &[(&str, &[u8])], choice: &SubsetChoice) -> Prepared {
        let folder = tempfile::tempdir().expect("a folder");
        let staged = uploaded.iter().enumerate().map(|(index, (name, content))| {
            let path = folder.path().join(format!("upload-{index}"));
            std::fs::write(&path, content).expect("written");
            StagedFile {
                name: (*name).to_owned(),
                path,
            }
        });
        let limits = Limits::default();
        let checks = Checks {
            limits: &limits,
            trial: None,
        };
        prepare(staged.collect(), choice, folder.path(), checks).expect("a working disk")
    }

    fn code(prepared: &Prepared, name: &str) -> &'static str {
        let file = prepared
            .files
            .iter()
            .find(|file| file.name == name)
            .expect("reported");
        match &file.outcome {
            Outcome::Refused(remark) => remark.code,
            _ => "",
        }
    }

    #[test]
    fn captions_find_their_images_in_any_order() {
        let png = png();
        let found = prepared(
            &[
                ("b.txt", b"of b"),
                ("a.png", &png),
                ("b.jpg", &png),
                ("a.caption", b"of a"),
                ("c.txt", b"of c"),
            ],
            &SubsetChoice::default(),
        );
        let captions: Vec<_> = found
            .images
            .iter()
            .map(|i| {
                (
                    i.file_name.as_str(),
                    i.caption.as_ref().map(|c| c.text.as_str()),
                )
            })
            .collect();
        assert_eq!(captions, [("a.png", Some("of a")), ("b.jpg", Some("of b"))]);
        assert_eq!(
            found
                .orphans
                .iter()
                .map(|c| c.stem.as_str())
                .collect::<Vec<_>>(),
            ["c"]
        );
        assert!(
            found
                .images
                .iter()
                .all(|image| image.target.name == DEFAULT_SUBSET)
        );
    }

    #[test]
    fn masks_find_their_images_and_are_images_without_one() {
        let png = png();
        let mut other = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::new(9, 3);
        picture
            .write_to(&mut other, image::ImageFormat::Png)
            .expect("an encoder");
        let found = prepared(
            &[
                ("10_a/x.mask.png", &png),
                ("10_a/x.jpg", &png),
                ("10_a/x.MASK.webp", &png),
                ("10_a/y.png", &png),
                ("10_a/y.mask.png", &other.into_inner()),
                ("10_a/lone.mask.png", &png),
                ("10_c/z.png", &png),
                ("masks/10_c/z.bmp", &png),
                ("10_c/masks/lone.png", &png),
                ("10_b/x.png", &png),
                ("10_b/broken.png", &png[..40]),
                ("10_b/broken.mask.png", &png),
            ],
            &SubsetChoice::default(),
        );
        let images: Vec<_> = found
            .images
            .iter()
            .map(|image| (image.file_name.as_str(), image.mask.is_some()))
            .collect();
        let expected = [
            ("x.jpg", true),
            ("y.png", false),
            ("lone.mask.png", false),
            ("z.png", true),
            ("lone.png", false),
            ("x.png", false),
        ];
        assert_eq!(images, expected);
        for (name, expected) in [
            ("10_a/x.MASK.webp", "second_mask"),
            ("10_a/y.mask.png", "mask_of_other_shape"),
            ("10_b/broken.mask.png", "no_image"),
        ] {
            assert_eq!(code(&found, name), expected, "{name}");
        }
    }

    #[test]
    fn bad_files_are_named_and_the_others_kept() {
        let png = png();
        let found = prepared(
            &[
                ("good.png", &png),
                ("cut.png", &png[..png.len() - 20]),
                ("text.png", b"hello"),
                ("../out.png", &png),
                ("good.txt", b"one"),
                ("good.caption", b"two"),
                ("bin.txt", b"\0\0"),
                (".DS_Store", b"x"),
            ],
            &SubsetChoice::default(),
        );
        assert_eq!(found.images.len(), 1);
        assert_eq!(
            found.images[0].caption.as_ref().map(|c| c.text.as_str()),
            Some("one")
        );
        for (name, expected) in [
            ("good.png", ""),
            ("cut.png", "truncated"),
            ("text.png", "not_an_image"),
            ("../out.png", "unsafe_path"),
            ("good.caption", "second_caption"),
            ("bin.txt", "not_text"),
        ] {
            assert_eq!(code(&found, name), expected, "{name}");
        }
    }

    #[test]
    fn folders_and_the_form_choose_the_subset() {
        let png = png();
        let choice = SubsetChoice {
            name: Some("5_dog".to_owned()),
            ..SubsetChoice::default()
        };
        let found = prepared(
            &[
                ("10_cat/a.png", &png),
                ("x.png", &png),
                ("reg/1_cat/r.png", &png),
            ],
            &choice,
        );
        let target = |index: usize| {
            let target = &found.images[index].target;
            (
                target.name.as_str(),
                target.repeats,
                target.is_reg,
                target.instance_prompt.as_deref(),
                target.class_prompt.as_deref(),
            )
        };
        assert_eq!(
            target(0),
            ("10_cat", Some(10), Some(false), Some("cat"), None)
        );
        assert_eq!(
            target(1),
            ("5_dog", Some(5), Some(false), Some("dog"), None)
        );
        assert_eq!(
            target(2),
            ("1_cat_reg", Some(1), Some(true), None, Some("cat"))
        );
    }

    /// Each of the inner archives could pass; together they are beyond what the outer one may unpack to.
    #[test]
    fn a_bomb_of_archives_is_refused_and_what_was_before_it_kept() {
        use std::io::Write as _;
        let zip = |entries: &[(&str, &[u8])]| {
            let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
            for (name, content) in entries {
                let options = zip::write::SimpleFileOptions::default();
                writer.start_file(*name, options).expect("started");
                writer.write_all(content).expect("written");
            }
            writer.finish().expect("finished").into_inner()
        };
        let inner = zip(&[("zeros.txt", &vec![0; 60 << 20])]);
        let png = png();
        let outer = zip(&[
            ("good.png", &png),
            ("a.zip", &inner),
            ("b.zip", &inner),
            ("c.zip", &inner),
        ]);
        let found = prepared(&[("bomb.zip", &outer)], &SubsetChoice::default());
        assert_eq!(found.images.len(), 1);
        let codes: Vec<_> = ["bomb.zip", "a.zip", "b.zip", "c.zip"]
            .map(|name| code(&found, name))
            .to_vec();
        assert_eq!(codes, ["", "", "unpacks_too_large", "unpacks_too_large"]);
        assert_eq!(code(&found, "a.zip/zeros.txt"), "too_large");
    }
}

//! The first half of an upload: files on disk become checked images with captions. Blocks; touches no rows.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::archive::{self, Unpacked};
use super::captions::{self, Caption};
use super::layout::{self, FolderSubset, Place};
use super::limits::Limits;
use super::pictures::{self, Picture, PictureError};
use super::report::{FileKind, FileReport, Outcome, Remark};

/// One uploaded file, already on disk.
#[derive(Debug)]
pub struct StagedFile {
    /// The name the client gave; it may have folders in it.
    pub name: String,
    pub path: PathBuf,
}

/// Where files go whose folder says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubsetChoice {
    pub name: Option<String>,
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
}

/// A subset that files go to. `None` leaves the value of an existing subset alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub name: String,
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
}

/// The subset of loose files when the upload names none.
pub const DEFAULT_SUBSET: &str = "default";

impl SubsetChoice {
    /// The subset of files in no folder. A name in kohya's form says repeats and concept, unless they are given.
    fn target(&self) -> Target {
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| DEFAULT_SUBSET.to_owned());
        let named = match layout::kohya_folder(&name) {
            Some(_) => layout::subset_of(std::slice::from_ref(&name)),
            None => None,
        };
        let is_reg = self.is_reg.or(named.as_ref().map(|subset| subset.is_reg));
        let tokens = named.as_ref().and_then(|subset| subset.tokens.clone());
        self.with_tokens(
            name,
            named.as_ref().and_then(|subset| subset.repeats),
            is_reg,
            tokens,
        )
    }

    /// The subset of files in a folder. What the folder's name says is more exact than what the upload says.
    fn target_of(&self, folder: FolderSubset) -> Target {
        let FolderSubset {
            name,
            repeats,
            is_reg,
            tokens,
        } = folder;
        match repeats {
            Some(_) => Target {
                repeats,
                ..Self::default().with_tokens(name, repeats, Some(is_reg), tokens)
            },
            None => self.with_tokens(name, None, self.is_reg.or(is_reg.then_some(true)), tokens),
        }
    }

    fn with_tokens(
        &self,
        name: String,
        repeats: Option<u32>,
        is_reg: Option<bool>,
        tokens: Option<String>,
    ) -> Target {
        let reg = is_reg.unwrap_or(false);
        let (instance, class) = if reg { (None, tokens) } else { (tokens, None) };
        Target {
            name,
            repeats: self.repeats.or(repeats),
            is_reg,
            instance_prompt: self.instance_prompt.clone().or(instance),
            class_prompt: self.class_prompt.clone().or(class),
        }
    }
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
    pub caption: Option<PreparedCaption>,
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
    limits: &Limits,
) -> std::io::Result<Prepared> {
    let mut files = Vec::new();
    let mut loose = Group::default();
    let mut groups = Vec::new();
    for file in uploaded {
        if archive::is_zip(&head(&file.path)?) {
            groups.push(unpack(file, scratch, limits, &mut files)?);
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
    let sorted = groups
        .into_iter()
        .flat_map(|group| group.assign(choice))
        .collect();
    Ok(check(sorted, files, limits))
}

fn unpack(
    file: StagedFile,
    scratch: &Path,
    limits: &Limits,
    files: &mut Vec<FileReport>,
) -> std::io::Result<Group> {
    let mut group = Group::default();
    let folder = tempfile::Builder::new()
        .prefix("zip-")
        .tempdir_in(scratch)?
        .keep(); // gone with `scratch`
    let unpacked = match archive::unpack(&file.path, &folder, limits) {
        Ok(unpacked) => unpacked,
        Err(archive::ArchiveError::Io(error)) => return Err(error),
        Err(error) => {
            files.push(FileReport::refused(
                file.name,
                FileKind::Archive,
                error.code(),
                error,
            ));
            return Ok(group);
        }
    };
    std::fs::remove_file(&file.path)?; // a large archive need not lie beside its content
    let accepted = Outcome::Accepted {
        image_id: None,
        subset: None,
    };
    files.push(FileReport::new(file.name, FileKind::Archive, accepted));
    let Unpacked { entries } = unpacked;
    for entry in entries {
        match entry.content {
            Ok((place, path)) => group.add(files, entry.name, place, path)?,
            Err(error) => files.push(FileReport::refused(
                entry.name,
                FileKind::Other,
                error.code(),
                error,
            )),
        }
    }
    Ok(group)
}

/// Files that share one root: the loose ones, or those of an archive.
#[derive(Default)]
struct Group {
    members: Vec<Member>,
}

struct Member {
    report: usize,
    place: Place,
    path: PathBuf,
    kind: FileKind,
}

impl Group {
    /// Tells by its first bytes what a file is. Only what is no image may be a caption, by its extension.
    fn add(
        &mut self,
        files: &mut Vec<FileReport>,
        name: String,
        place: Place,
        path: PathBuf,
    ) -> std::io::Result<()> {
        if place.is_litter() {
            files.push(FileReport::new(name, FileKind::Other, Outcome::Ignored));
            return Ok(());
        }
        let head = head(&path)?;
        let is_caption = matches!(place.extension().as_str(), "txt" | "caption");
        let kind = match pictures::format_of(&head) {
            Some(_) => FileKind::Image,
            None if is_caption => FileKind::Caption,
            None => {
                let found = if archive::is_zip(&head) {
                    "an archive inside of an archive"
                } else {
                    "something else"
                };
                let message =
                    format!("found {found}; {EXPECTED}, or a caption named *.txt or *.caption");
                files.push(FileReport::refused(
                    name,
                    FileKind::Other,
                    PictureError::NotAnImage.code(),
                    message,
                ));
                return Ok(());
            }
        };
        self.members.push(Member {
            report: files.len(),
            place,
            path,
            kind,
        });
        files.push(FileReport::new(name, kind, Outcome::Ignored)); // overwritten when its fate is known
        Ok(())
    }

    fn assign(self, choice: &SubsetChoice) -> Vec<(Member, Target)> {
        let skip = usize::from(
            layout::common_folder(self.members.iter().map(|member| &member.place)).is_some(),
        );
        self.members
            .into_iter()
            .map(|member| {
                let target =
                    match layout::subset_of(member.place.folders.get(skip..).unwrap_or_default()) {
                        Some(folder) => choice.target_of(folder),
                        None => choice.target(),
                    };
                (member, target)
            })
            .collect()
    }
}

const EXPECTED: &str = "expected a PNG, JPEG, WebP, BMP, GIF or TIFF image";

/// Decodes every image on all cores, reads every caption, and brings the two together by folder and stem.
fn check(members: Vec<(Member, Target)>, mut files: Vec<FileReport>, limits: &Limits) -> Prepared {
    let (images, captions): (Vec<_>, Vec<_>) = members
        .into_iter()
        .partition(|(m, _)| m.kind == FileKind::Image);
    let mut by_stem = HashMap::new();
    let mut used_stems = HashMap::new();
    for (member, target) in captions {
        let key = (
            target.name.clone(),
            member.place.folders.clone(),
            member.place.stem().to_owned(),
        );
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
                        target,
                        text: caption.text,
                    },
                );
            }
            Err(remark) => refuse(&mut files[member.report], remark.code, remark.message),
        }
    }
    let pictures: Vec<_> = images
        .par_iter()
        .map(|(member, _)| pictures::check(&member.path, limits))
        .collect();
    let mut prepared = Prepared::default();
    let mut used = HashSet::new();
    for ((member, target), picture) in images.into_iter().zip(pictures) {
        match picture {
            Ok(picture) => {
                let key = (
                    target.name.clone(),
                    member.place.folders.clone(),
                    member.place.stem().to_owned(),
                );
                let caption = by_stem.get(&key).cloned(); // `a.png` and `a.jpg` share `a.txt`, as in sd-scripts
                used.extend(caption.as_ref().map(|caption| caption.report));
                prepared.images.push(PreparedImage {
                    report: member.report,
                    path: member.path,
                    file_name: member.place.file_name,
                    target,
                    picture,
                    caption,
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

fn refuse(file: &mut FileReport, code: &'static str, message: impl Into<String>) {
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

fn head(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)?.take(64).read_to_end(&mut head)?;
    Ok(head)
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
        prepare(staged.collect(), choice, folder.path(), &Limits::default())
            .expect("a working disk")
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
}

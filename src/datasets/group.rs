//! Files of an upload that share one root: what each of them is, and which subset it goes to.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;

use super::dataset_toml::{self, SubsetEntry};
use super::layout::{self, Place};
use super::limits::Limits;
use super::prepare::{self, refuse};
use super::report::{FileKind, FileReport, Outcome, Remark};
use super::tables::{self, TableKind};
use super::target::{SubsetChoice, Target};
use crate::pictures::Format;

/// The loose files of an upload, or those of an archive.
#[derive(Default)]
pub struct Group {
    found: Vec<Found>,
}

/// A file whose subset is not known yet.
struct Found {
    report: usize,
    place: Place,
    path: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Image,
    Caption,
    Table(TableKind),
    Settings,
    /// Nothing that is taken, unless settings call it a caption.
    Unknown,
}

/// An image or a caption, and where it goes.
pub struct Member {
    /// Its index among the reports.
    pub report: usize,
    pub place: Place,
    pub path: PathBuf,
    pub kind: FileKind,
    pub target: Target,
    /// What a table says of an image.
    pub listed_caption: Option<String>,
}

/// What an image and its caption have in common.
pub type Key = (String, Vec<String>, String);

impl Member {
    pub fn key(&self) -> Key {
        (
            self.target.name.clone(),
            self.place.folders.clone(),
            self.place.stem().to_owned(),
        )
    }

    /// Where it is, whatever its ending.
    pub fn spot(&self) -> Spot {
        (self.place.folders.clone(), self.place.stem().to_owned())
    }

    /// Where the image is that this one would be the mask of: `a.mask.png` that of `a.jpg` beside it, `masks/x/a.png`
    /// that of `x/a.jpg`.
    pub fn mask_of(&self) -> Option<Spot> {
        let (mut folders, stem) = self.spot();
        let cut = stem.len().checked_sub(MASK.len());
        if let Some((of, ending)) = cut.and_then(|cut| stem.split_at_checked(cut))
            && !of.is_empty()
            && ending.eq_ignore_ascii_case(MASK)
        {
            return Some((folders, of.to_owned()));
        }
        let is_masks = |folder: &String| folder.eq_ignore_ascii_case(MASKS);
        folders.remove(folders.iter().rposition(is_masks)?);
        Some((folders, stem))
    }
}

/// A folder and a stem.
pub type Spot = (Vec<String>, String);

/// What the stem of a mask ends with.
pub const MASK: &str = ".mask";
/// The folder that masks may be in.
pub const MASKS: &str = "masks";

const EXPECTED: &str = "expected a PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF image, a zip or tar of them, a caption named \
                        *.txt or *.caption, metadata.jsonl, metadata.csv or sd-scripts' dataset settings (*.toml)";

impl Group {
    /// Tells by its first bytes what a file is. Only what is no image may be something else, by its name.
    pub fn add(
        &mut self,
        files: &mut Vec<FileReport>,
        name: String,
        place: Place,
        path: PathBuf,
    ) -> io::Result<()> {
        if place.is_litter() {
            files.push(FileReport::new(name, FileKind::Other, Outcome::Ignored));
            return Ok(());
        }
        let kind = if Format::of(&prepare::head(&path)?).is_some() {
            Kind::Image
        } else if let Some(kind) = TableKind::of(&place) {
            Kind::Table(kind)
        } else {
            match place.extension().as_str() {
                "txt" | "caption" => Kind::Caption,
                "toml" => Kind::Settings,
                _ => Kind::Unknown,
            }
        };
        let reported = match kind {
            Kind::Image => FileKind::Image,
            Kind::Caption => FileKind::Caption,
            Kind::Table(_) | Kind::Settings => FileKind::Metadata,
            Kind::Unknown => FileKind::Other,
        };
        self.found.push(Found {
            report: files.len(),
            place,
            path,
            kind,
        });
        files.push(FileReport::new(name, reported, Outcome::Ignored)); // overwritten when its fate is known
        Ok(())
    }

    /// Gives every image and caption its subset, by settings, by folder, or by the upload's own words.
    pub fn assign(
        self,
        choice: &SubsetChoice,
        limits: &Limits,
        files: &mut [FileReport],
    ) -> Vec<Member> {
        let settings = self.settings(files);
        let captions = self.tables(limits, files);
        let places = self.found.iter().map(|found| &found.place);
        let skip = usize::from(layout::common_folder(places).is_some());
        let folders: HashSet<&[String]> = self
            .found
            .iter()
            .filter(|found| found.kind == Kind::Image)
            .map(|found| found.place.folders.as_slice())
            .collect();
        let by_folder: HashMap<Vec<String>, usize> = folders
            .into_iter()
            .filter_map(|folder| Some((folder.to_vec(), settings.of_folder(folder)?)))
            .collect();
        settings.remark_unused(&by_folder, files);
        let mut listed = captions;
        let mut members = Vec::new();
        for found in self.found {
            let entry = by_folder
                .get(&found.place.folders)
                .map(|index| &settings.subsets[*index]);
            let kind = match found.kind {
                Kind::Image => FileKind::Image,
                Kind::Caption => FileKind::Caption,
                Kind::Unknown if is_caption_of(entry, &found.place) => {
                    files[found.report].kind = FileKind::Caption;
                    FileKind::Caption
                }
                Kind::Unknown => {
                    let message = format!("found something else; {EXPECTED}");
                    refuse(&mut files[found.report], "not_an_image", message);
                    continue;
                }
                Kind::Table(_) | Kind::Settings => continue,
            };
            let target = match entry {
                Some((name, entry)) => choice.target_by(name.clone(), entry),
                None => {
                    let folders = found.place.folders.get(skip..).unwrap_or_default();
                    match layout::subset_of(folders) {
                        Some(folder) => choice.target_of(folder),
                        None => choice.target(),
                    }
                }
            };
            let listed_caption = match kind {
                FileKind::Image => listed.remove(&found.place),
                _ => None,
            };
            members.push(Member {
                report: found.report,
                place: found.place,
                path: found.path,
                kind,
                target,
                listed_caption: listed_caption.map(|(_, caption)| caption),
            });
        }
        remark_rest(&listed, files);
        members
    }

    fn settings(&self, files: &mut [FileReport]) -> Settings {
        let mut settings = Settings::default();
        for found in self.found.iter().filter(|f| f.kind == Kind::Settings) {
            let file = &mut files[found.report];
            match dataset_toml::read(&found.path) {
                Ok(read) => {
                    file.outcome = TAKEN;
                    file.remarks = read.remarks;
                    for entry in read.subsets {
                        settings.add(found.report, entry, file);
                    }
                }
                Err(remark) => file.outcome = Outcome::Refused(remark),
            }
        }
        settings
    }

    /// Captions of all tables, with the table that has them.
    fn tables(&self, limits: &Limits, files: &mut [FileReport]) -> HashMap<Place, (usize, String)> {
        let mut captions = HashMap::new();
        for found in &self.found {
            let Kind::Table(kind) = found.kind else {
                continue;
            };
            let file = &mut files[found.report];
            match tables::read(kind, &found.path, &found.place.folders, limits) {
                Ok(table) => {
                    file.outcome = TAKEN;
                    file.remarks = table.remarks;
                    let rows = table.captions.into_iter();
                    captions.extend(rows.map(|(place, text)| (place, (found.report, text))));
                }
                Err(remark) => file.outcome = Outcome::Refused(remark),
            }
        }
        captions
    }
}

const TAKEN: Outcome = Outcome::Accepted {
    image_id: None,
    subset: None,
};

fn is_caption_of(entry: Option<&(String, SubsetEntry)>, place: &Place) -> bool {
    let extension = entry.and_then(|(_, entry)| entry.caption_extension.as_deref());
    extension == Some(place.extension().as_str())
}

/// Rows of tables whose file is not there.
fn remark_rest(rest: &HashMap<Place, (usize, String)>, files: &mut [FileReport]) {
    let mut by_table: HashMap<usize, Vec<&Place>> = HashMap::new();
    for (place, (report, _)) in rest {
        by_table.entry(*report).or_default().push(place);
    }
    for (report, places) in by_table {
        let first = places.iter().map(|place| place.file_name.as_str()).min();
        let message = format!(
            "the upload has no image for {} rows, such as `{}`",
            places.len(),
            first.unwrap_or_default()
        );
        files[report].remarks.push(Remark::new("no_image", message));
    }
}

/// Subsets of sd-scripts' settings: their names here, and what is said about them.
#[derive(Default)]
struct Settings {
    subsets: Vec<(String, SubsetEntry)>,
    reports: Vec<usize>,
}

impl Settings {
    /// The last folder's name is the subset's; one that is taken gets a number.
    fn add(&mut self, report: usize, entry: SubsetEntry, file: &mut FileReport) {
        let Some(last) = entry.image_dir.last() else {
            let message = "found a subset whose `image_dir` names no folder";
            file.remarks.push(Remark::new("invalid_subset", message));
            return;
        };
        if self
            .subsets
            .iter()
            .any(|(_, known)| known.image_dir == entry.image_dir)
        {
            let message = format!(
                "`{}` is the folder of a subset already",
                entry.image_dir.join("/")
            );
            file.remarks.push(Remark::new("second_subset", message));
            return;
        }
        let is_taken = |name: &str| self.subsets.iter().any(|(taken, _)| taken == name);
        let numbered = (2..).map(|number| format!("{last}-{number}"));
        let name = std::iter::once(last.clone())
            .chain(numbered)
            .find(|name| !is_taken(name))
            .unwrap_or_else(|| last.clone());
        self.subsets.push((name, entry));
        self.reports.push(report);
    }

    /// The subset whose `image_dir` ends as the folder does, in the most names; of an upload without folders the only one.
    fn of_folder(&self, folder: &[String]) -> Option<usize> {
        if folder.is_empty() {
            return (self.subsets.len() == 1).then_some(0);
        }
        let common = |entry: &SubsetEntry| {
            let pairs = entry.image_dir.iter().rev().zip(folder.iter().rev());
            pairs.take_while(|(a, b)| a == b).count()
        };
        let ranked = self
            .subsets
            .iter()
            .map(|(_, entry)| common(entry))
            .enumerate();
        // The first one of several as good ones.
        let best = ranked.rev().max_by_key(|(_, names)| *names);
        best.filter(|(_, names)| *names > 0).map(|(index, _)| index)
    }

    fn remark_unused(&self, used: &HashMap<Vec<String>, usize>, files: &mut [FileReport]) {
        let used: HashSet<usize> = used.values().copied().collect();
        for (index, (_, entry)) in self.subsets.iter().enumerate() {
            if !used.contains(&index) {
                let message = format!(
                    "the upload has no images in a folder `{}`",
                    entry.image_dir.join("/")
                );
                files[self.reports[index]]
                    .remarks
                    .push(Remark::new("no_folder", message));
            }
        }
    }
}

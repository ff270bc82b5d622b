//! The resume points of one run: the last two, the newest of which that is whole is used.

use std::fs;
use std::path::{Path, PathBuf};

use super::file::{self, PointName};
use super::{ResumeError, ResumePoint};

/// How many are kept: one may turn out to be damaged.
const KEPT: usize = 2;

/// A folder with the resume points of one run.
#[derive(Debug, Clone)]
pub struct ResumeFolder {
    path: PathBuf,
}

impl ResumeFolder {
    /// Makes the folder where it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(path: &Path) -> Result<Self, ResumeError> {
        fs::create_dir_all(path).map_err(|source| io(path, source))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Writes a point; older ones than the last two are removed.
    ///
    /// # Errors
    /// When it cannot be written; those that are there stay.
    pub fn write(&self, point: &ResumePoint) -> Result<(), ResumeError> {
        let name = file::write(point, &self.path)?;
        let mut others = self.names()?;
        others.retain(|other| *other != name);
        for old in others.iter().rev().skip(KEPT - 1) {
            self.remove(old);
        }
        Ok(())
    }

    /// Writes a point of a run that has gone back: none of this step or a later one stays beside it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_back(&self, point: &ResumePoint) -> Result<(), ResumeError> {
        let name = file::write(point, &self.path)?;
        for other in self.names()? {
            if other.step >= name.step && other != name {
                self.remove(&other);
            }
        }
        Ok(())
    }

    /// The newest point that is whole; `None` when there is none. Damaged ones are told and removed.
    ///
    /// # Errors
    /// When the folder or a file cannot be read.
    pub fn newest(&self) -> Result<Option<ResumePoint>, ResumeError> {
        for name in self.names()?.iter().rev() {
            match file::read(name, &self.path) {
                Ok(point) => return Ok(Some(point)),
                Err(error @ ResumeError::Damaged { .. }) => {
                    tracing::warn!(%error, "a resume point is not used");
                    self.remove(name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The steps of the points that are there, rising; whether they are whole is not looked at.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, ResumeError> {
        Ok(self.names()?.iter().map(|name| name.step).collect())
    }

    /// Puts the newest point into another run's folder too; `false` when there is none.
    ///
    /// # Errors
    /// When it can be neither linked nor copied.
    pub fn copy_newest_to(&self, other: &Self) -> Result<bool, ResumeError> {
        let Some(name) = self.names()?.pop() else {
            return Ok(false);
        };
        let (from, to) = (name.path(&self.path), name.path(&other.path));
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to).map_err(|source| io(&to, source))?;
            let copy = fs::File::open(&to).map_err(|source| io(&to, source))?;
            copy.sync_all().map_err(|source| io(&to, source))?;
        }
        file::sync(&other.path).map_err(|source| io(&other.path, source))?;
        Ok(true)
    }

    /// Removes what a process that was killed has left unfinished.
    pub fn clear_unfinished(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(".tmp") {
                let _ = fs::remove_file(entry.path()); // it is not counted as a point either way
            }
        }
    }

    /// Rising by step.
    fn names(&self) -> Result<Vec<PointName>, ResumeError> {
        let entries = fs::read_dir(&self.path).map_err(|source| io(&self.path, source))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| io(&self.path, source))?;
            names.extend(entry.file_name().to_str().and_then(PointName::parse));
        }
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &PointName) {
        let path = name.path(&self.path);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a resume point was not removed");
        }
    }
}

fn io(path: &Path, source: std::io::Error) -> ResumeError {
    ResumeError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::super::{Owner, Part, PartTensor, Parts, Resumable};
    use super::*;
    use crate::training::TrainError;
    use crate::training::optimizer::StateDtype;

    fn owner() -> Owner {
        Owner::from([("the seed".to_owned(), "7".to_owned())])
    }

    fn point(step: u64) -> ResumePoint {
        let tensor = |name: &str, dtype, data: Vec<u8>, shape: &[usize]| PartTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            dtype,
            data,
        };
        let part = Part {
            values: json!({"step": step}),
            tensors: vec![
                tensor("count", StateDtype::I64, vec![1; 8], &[]),
                tensor("a.weight/m", StateDtype::F32, vec![2; 24], &[2, 3]),
                tensor("bytes", StateDtype::U8, vec![3; 3], &[3]),
            ],
        };
        ResumePoint {
            step,
            owner: owner(),
            parts: BTreeMap::from([
                ("one".to_owned(), part.clone()),
                ("two".to_owned(), part),
                ("three".to_owned(), Part::default()),
            ]),
        }
    }

    fn folder() -> (tempfile::TempDir, ResumeFolder) {
        let temporary = tempfile::tempdir().expect("a folder");
        let folder = ResumeFolder::open(&temporary.path().join("resume")).expect("made");
        (temporary, folder)
    }

    fn sorted(mut point: ResumePoint) -> ResumePoint {
        for part in point.parts.values_mut() {
            part.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        }
        point
    }

    #[test]
    fn the_last_two_are_kept_and_the_newest_is_read() {
        let (_temporary, folder) = folder();
        assert_eq!(folder.newest().expect("read"), None);
        for step in [5, 9, 10, 12] {
            folder.write(&point(step)).expect("written");
        }
        assert_eq!(folder.steps().expect("read"), [10, 12]);
        let newest = folder.newest().expect("read").expect("there");
        assert_eq!(sorted(newest), sorted(point(12)));
        // The same moment again, as after a crash, is one file.
        folder.write(&point(12)).expect("written");
        assert_eq!(folder.steps().expect("read"), [10, 12]);
    }

    #[test]
    fn a_run_that_has_gone_back_leaves_nothing_ahead() {
        let (_temporary, folder) = folder();
        for step in [5, 9] {
            folder.write(&point(step)).expect("written");
        }
        let mut other = point(9);
        other.parts.remove("three");
        folder.write_back(&other).expect("written");
        assert_eq!(folder.steps().expect("read"), [5, 9]);
        let newest = folder.newest().expect("read").expect("there");
        assert_eq!(sorted(newest), sorted(other));
        folder.write_back(&point(5)).expect("written");
        assert_eq!(folder.steps().expect("read"), [5]);
    }

    #[test]
    fn a_damaged_point_gives_way_to_the_one_before() {
        for damage in [
            |bytes: &mut Vec<u8>| bytes.truncate(100),
            |bytes: &mut Vec<u8>| bytes.clear(),
            |bytes: &mut Vec<u8>| bytes[40] ^= 1,
            |bytes: &mut Vec<u8>| *bytes.last_mut().expect("a byte") ^= 0x80,
            |bytes: &mut Vec<u8>| bytes.push(0),
        ] {
            let (_temporary, folder) = folder();
            folder.write(&point(1)).expect("written");
            folder.write(&point(2)).expect("written");
            let name = folder.names().expect("read").pop().expect("there");
            let path = name.path(&folder.path);
            let mut bytes = fs::read(&path).expect("read");
            damage(&mut bytes);
            fs::write(&path, bytes).expect("written");
            let newest = folder.newest().expect("read").expect("the one before");
            assert_eq!(newest.step, 1);
            assert_eq!(folder.steps().expect("read"), [1]);
        }
    }

    #[test]
    fn what_is_not_a_point_is_left_alone_and_what_is_unfinished_is_cleared() {
        let (_temporary, folder) = folder();
        for name in [".tmpabc", "notes", "step-1-xyz.safetensors"] {
            fs::write(folder.path.join(name), b"").expect("written");
        }
        assert_eq!(folder.newest().expect("read"), None);
        folder.clear_unfinished();
        assert!(!folder.path.join(".tmpabc").exists());
        assert!(folder.path.join("notes").exists());
    }

    #[test]
    fn another_run_gets_a_copy_of_the_newest() {
        let (_temporary, from) = folder();
        let (_other, to) = folder();
        assert!(!from.copy_newest_to(&to).expect("looked"));
        from.write(&point(3)).expect("written");
        from.write(&point(4)).expect("written");
        assert!(from.copy_newest_to(&to).expect("copied"));
        assert_eq!(to.newest().expect("read").expect("there").step, 4);
    }

    struct Nothing;

    impl Resumable for Nothing {
        fn keep(&mut self) -> Result<Part, TrainError> {
            Ok(Part::default())
        }
        fn take_up(&mut self, _: Part) -> Result<(), TrainError> {
            Ok(())
        }
    }

    #[test]
    fn a_point_of_something_else_is_refused_by_name() {
        let refused = |owner: &Owner, names: &[&'static str]| {
            let mut held: Vec<(&'static str, Nothing)> =
                names.iter().map(|name| (*name, Nothing)).collect();
            let parts: Parts<'_> = held
                .iter_mut()
                .map(|(name, part)| (*name, part as &mut dyn Resumable))
                .collect();
            let restored = point(1).restore(owner, parts);
            restored.err().map(|error| error.to_string())
        };
        let all = ["one", "two", "three"];
        assert_eq!(refused(&owner(), &all), None);
        let other = Owner::from([("the seed".to_owned(), "8".to_owned())]);
        let message = refused(&other, &all).expect("refused");
        assert!(message.contains("the seed was `7` then and is `8` now"));
        assert!(refused(&Owner::new(), &all).is_some());
        for (names, word) in [
            (&all[..2], "three"),
            (&["one", "two", "three", "four"], "four"),
        ] {
            let message = refused(&owner(), names).expect("refused");
            assert!(message.contains(word), "{message}");
        }
    }
}

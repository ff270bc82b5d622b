//! What decides the queue: room on devices, whose turn it was last, numbers that no clock gives.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, DatabaseTransaction, DbBackend, EntityTrait as _,
    QueryFilter as _, QuerySelect as _,
};
use uuid::Uuid;

use super::{Run, RunState, unsigned, words};
use crate::store::rows::run;
use crate::store::{Store, StoreError};

/// The advisory lock of the queue; any number that nothing else of the database uses.
const LOCK: i64 = 0x6c6f_7261_7175_6575;

/// How many runs may be held at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// On all devices together.
    pub runs: usize,
    /// On each device.
    pub per_device: usize,
    /// The states in which a worker holds a run, and with it a device.
    pub held: &'static [RunState],
}

/// When each key had its last turn, as a number that grows with every run that is taken. Keys without one had none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    last: HashMap<Option<Uuid>, u64>,
    newest: u64,
}

impl Turns {
    /// The last turn of whoever has made a run; 0 before the first.
    pub fn last(&self, api_key_id: Option<Uuid>) -> u64 {
        self.last.get(&api_key_id).copied().unwrap_or(0)
    }

    /// Gives the next turn.
    pub fn give(&mut self, api_key_id: Option<Uuid>) {
        self.newest += 1;
        self.last.insert(api_key_id, self.newest);
    }
}

impl Store {
    /// Whose turn it was last.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn turns(&self) -> Result<Turns, StoreError> {
        let rows: Vec<(Option<Uuid>, Option<i64>)> = run::Entity::find()
            .select_only()
            .column(run::Column::ApiKeyId)
            .column_as(run::Column::Turn.max(), "last")
            .group_by(run::Column::ApiKeyId)
            .into_tuple()
            .all(&self.db)
            .await?;
        let last: HashMap<_, _> = rows
            .into_iter()
            .map(|(key, turn)| (key, turn.map_or(0, unsigned)))
            .collect();
        let newest = last.values().copied().max().unwrap_or(0);
        Ok(Turns { last, newest })
    }
}

/// The id of the device that a held run uses: what its worker has noted begins with it.
fn device_id<'a>(noted: Option<&'a str>, wanted: Option<&'a str>) -> Option<&'a str> {
    let noted = noted.and_then(|noted| noted.split(' ').next());
    noted.or(wanted)
}

impl Run {
    /// The id of the device that it uses while a worker holds it.
    pub fn used_device(&self) -> Option<&str> {
        device_id(self.device.as_deref(), self.wanted_device.as_deref())
    }
}

/// Lets one transaction at a time decide on the queue. SQLite's have the write lock already.
pub(super) async fn lock(transaction: &DatabaseTransaction) -> Result<(), StoreError> {
    if transaction.get_database_backend() == DbBackend::Postgres {
        let statement = format!("SELECT pg_advisory_xact_lock({LOCK})");
        transaction.execute_unprepared(&statement).await?;
    }
    Ok(())
}

/// The number after the highest in a column.
pub(super) async fn next(
    transaction: &DatabaseTransaction,
    column: run::Column,
) -> Result<i64, StoreError> {
    let highest: Option<Option<i64>> = run::Entity::find()
        .select_only()
        .column_as(column.max(), "highest")
        .into_tuple()
        .one(transaction)
        .await?;
    Ok(highest.flatten().unwrap_or(0) + 1)
}

/// Whether one more run may be held on a device.
pub(super) async fn has_room(
    transaction: &DatabaseTransaction,
    room: Room,
    wanted: Option<&str>,
) -> Result<bool, StoreError> {
    let held: Vec<(Option<String>, Option<String>)> = run::Entity::find()
        .select_only()
        .columns([run::Column::Device, run::Column::WantedDevice])
        .filter(run::Column::State.is_in(words(room.held)))
        .into_tuple()
        .all(transaction)
        .await?;
    let devices = held
        .iter()
        .map(|(noted, wanted)| device_id(noted.as_deref(), wanted.as_deref()));
    let same = devices.filter(|device| *device == wanted).count();
    Ok(held.len() < room.runs && same < room.per_device)
}

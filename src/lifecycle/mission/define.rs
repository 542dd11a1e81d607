//! A mission's definition: made, changed, and edited part by part (contract 2.8.9). A run that is under way keeps the
//! definition that it began with.

use chrono::{DateTime, Utc};

use super::super::schedule::{self, NewSchedule, ScheduleChange};
use super::super::{LifecycleError, Result};
use super::{pause, resume, taken, wrong_state};
use crate::ids::{self, Id};
use crate::mission::{Document, EditError, Mission, Status};
use crate::store::ProjectDb;

/// A mission to be made. Its definition was checked.
#[derive(Debug)]
pub struct NewMission {
    /// Its name.
    pub name: String,
    /// Its definition.
    pub document: Document,
    /// When it begins by itself.
    pub schedule: Option<NewSchedule>,
}

/// Makes a mission.
///
/// # Errors
/// [`LifecycleError::Conflict`] for a name that is taken.
pub async fn create(db: &ProjectDb, new: NewMission) -> Result<Mission> {
    let mut tx = db.begin();
    let mut mission = Mission::new(new.name, Utc::now());
    mission.tell_saved();
    tx.create_mission(&mut mission, &new.document)
        .await
        .map_err(|error| taken(error, &mission.name))?;
    if let Some(schedule) = new.schedule {
        schedule::put(&mut tx, &mut mission, schedule, Utc::now()).await?;
        tx.save_mission(&mut mission).await?;
    }
    tx.commit().await?;
    Ok(mission)
}

/// A change to a mission; `None` leaves a field as it is.
#[derive(Debug, Default)]
pub struct MissionChange {
    /// Another name.
    pub name: Option<String>,
    /// Members of the definition; null removes one.
    pub definition: serde_json::Map<String, serde_json::Value>,
    /// A status set by hand.
    pub status: Option<Status>,
    /// Another schedule, or none.
    pub schedule: Option<Option<NewSchedule>>,
    /// Another end of the schedule that there is, or none.
    pub end_date: Option<Option<DateTime<Utc>>>,
}

/// Changes a mission.
///
/// # Errors
/// [`LifecycleError::Faults`] for a definition that would be faulty; 409 for a name that is taken and a status that cannot be set
/// by hand.
pub async fn update(db: &ProjectDb, id: Id<ids::Mission>, change: MissionChange) -> Result<()> {
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(id).await?;
    if let Some(name) = change.name {
        mission.name = name;
    }
    if !change.definition.is_empty() {
        let mut members = tx.mission_definition(id).await?;
        for (member, value) in change.definition {
            if value.is_null() {
                members.remove(&member);
            } else {
                members.insert(member, value);
            }
        }
        let (document, _) = Document::check(&members).map_err(LifecycleError::Faults)?;
        tx.save_definition(id, &document).await?;
    }
    match change.schedule {
        Some(Some(new)) => schedule::put_over(&mut tx, &mut mission, new, Utc::now()).await?,
        Some(None) => schedule::remove(&mut tx, &mut mission).await?,
        None => {}
    }
    if let Some(end_date) = change.end_date {
        let change = ScheduleChange {
            end_date: Some(end_date),
            ..ScheduleChange::default()
        };
        schedule::change(&mut tx, &mut mission, change).await?;
    }
    let later = match change.status.filter(|status| *status != mission.status()) {
        Some(status) => set_by_hand(&mut tx, &mut mission, status).await?,
        None => None,
    };
    mission.tell_saved();
    let name = mission.name.clone();
    tx.save_mission(&mut mission)
        .await
        .map_err(|error| taken(error, &name))?;
    tx.commit().await?;
    match later {
        Some(Status::Paused) => pause(db, id).await,
        Some(_) => resume(db, id, false).await.map(drop),
        None => Ok(()),
    }
}

/// A status by hand, within what the machine has: back to a draft; ended without a run; paused, and on again, which
/// are deeds of their own.
async fn set_by_hand(
    tx: &mut crate::store::ProjectTx,
    mission: &mut Mission,
    to: Status,
) -> Result<Option<Status>> {
    match (mission.status(), to) {
        (Status::Active, Status::Paused) | (Status::Paused, Status::Active) => Ok(Some(to)),
        (Status::Active | Status::Paused, _) => Err(wrong_state(
            mission,
            &format!("made `{to}` by hand; abort it first"),
        )),
        (Status::Scheduled | Status::Recurring, Status::Draft) => {
            schedule::remove(tx, mission).await?;
            Ok(None)
        }
        (Status::Completed | Status::Failed | Status::Cancelled, Status::Draft) => {
            mission.go(Status::Draft, None)?;
            Ok(None)
        }
        _ => Err(wrong_state(
            mission,
            &format!("made `{to}` by hand; use execute, abort or a schedule"),
        )),
    }
}

/// Edits a part of a mission's definition; the whole is checked again.
///
/// # Errors
/// [`LifecycleError::Missing`], [`LifecycleError::Conflict`] and [`LifecycleError::Faults`].
pub async fn edit(
    db: &ProjectDb,
    id: Id<ids::Mission>,
    edit: impl FnOnce(&Document) -> std::result::Result<Document, EditError> + Send,
) -> Result<()> {
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(id).await?;
    let members = tx.mission_definition(id).await?;
    let document = Document::parse(&members).map_err(LifecycleError::Faults)?;
    let edited = edit(&document).map_err(|error| match error {
        EditError::Missing(sentence) => LifecycleError::Missing(sentence),
        EditError::Conflict(sentence) => LifecycleError::Conflict(sentence),
        EditError::Faults(faults) => LifecycleError::Faults(faults),
    })?;
    tx.save_definition(id, &edited).await?;
    mission.tell_saved();
    tx.save_mission(&mut mission).await?;
    tx.commit().await?;
    Ok(())
}

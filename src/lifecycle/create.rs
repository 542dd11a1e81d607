//! A new task: checked, stored, told, and owed its first step.

use chrono::Utc;
use serde_json::json;

use super::approve::request_approval;
use super::{LifecycleError, NOW, Result, next_look};
use crate::store::{Job, Need, ProjectDb, StoreError};
use crate::task::{Bypass, Document, Gate, Hook, Status, Task};

/// A task to be made.
#[derive(Debug)]
pub struct NewTask {
    /// What it is called.
    pub title: String,
    /// The agent that is to do it.
    pub assign_to: String,
    /// A label.
    pub group: Option<String>,
    /// Whether it is not to be worked on yet.
    pub draft: bool,
    /// The rest.
    pub document: Document,
}

/// Makes a task.
///
/// # Errors
/// [`LifecycleError::Invalid`] for an agent or a need that does not exist; [`LifecycleError::Conflict`] for a title that is taken.
pub async fn create(db: &ProjectDb, new: NewTask) -> Result<Task> {
    let settings = db.settings().await?;
    let assign_to = match db.agent(&new.assign_to).await {
        Ok(agent) => agent.name.clone(),
        Err(StoreError::NotFound) => {
            return Err(LifecycleError::Invalid {
                param: "assignTo",
                message: format!("`assignTo`: there is no agent \"{}\".", new.assign_to),
            });
        }
        Err(error) => return Err(error.into()),
    };
    let mut tx = db.begin();
    let mut ids = Vec::new();
    for name in &new.document.depends_on {
        match tx.find_need(name).await {
            Ok(need) => ids.push(need),
            Err(StoreError::NotFound) => {
                return Err(LifecycleError::Invalid {
                    param: "dependsOn",
                    message: format!(
                        "`dependsOn`: there is no task \"{name}\", by id or by title."
                    ),
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    let needs = if ids.is_empty() {
        Vec::new()
    } else {
        tx.hold_needs(&ids).await?
    };
    let mut task = Task::new(new.title, assign_to, new.document, Utc::now());
    task.group = new.group;
    let mut gated = None;
    if !new.draft {
        let gates = &settings.approval_gates;
        gated = Gate::closed(gates, Hook::TaskCreate, &task, &json!({}));
        if gated.is_some() {
            task.bypass(Bypass::GatedAtCreation);
        } else {
            task.go(Status::Pending)?;
        }
    }
    task.tell_created();
    let waits = gated.is_none() && task.status() == Status::Pending;
    let hopeless = waits && needs.iter().any(Need::is_hopeless);
    let owed = waits && needs.iter().all(|need| need.status == Some(Status::Done));
    if gated.is_none() && ids.is_empty() {
        tx.create_task_last(&mut task, owed);
    } else {
        tx.create_task(&mut task, &ids, owed)
            .await
            .map_err(|error| taken(error, &task.title))?;
    }
    if let Some(gate) = gated {
        request_approval(&mut tx, &mut task, &gate, Hook::TaskCreate).await?;
        tx.save_task(&mut task).await?;
    } else if hopeless {
        tx.enqueue(Job::Blocked(task.id), 1.0, NOW).await?;
    }
    if let Some(pause) = next_look(&task, Utc::now()) {
        tx.enqueue(Job::Deadline(task.id), 1.0, pause).await?;
    }
    tx.commit()
        .await
        .map_err(|error| taken(error, &task.title))?;
    Ok(task)
}

pub(super) fn taken(error: StoreError, title: &str) -> LifecycleError {
    if error.is_title_taken() {
        LifecycleError::Conflict(format!(
            "A task \"{title}\" is not finished yet. Wait for it, or choose another title."
        ))
    } else {
        error.into()
    }
}

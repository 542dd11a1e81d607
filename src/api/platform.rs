//! The control plane (contract 2.19): organizations, projects, keys and provider credentials, for the admin.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{ApiError, ErrorBody};
use super::extract::{Json, Listed, Page, Path, Query};
use crate::app::App;
use crate::seal::masked;
use crate::store::{
    CredentialRow, KeyRow, OrganizationRow, ProjectRow, ProjectStatus, SealedCredential,
    StoreError, World,
};

/// An organization.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrganizationView {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its unique short name.
    pub slug: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

impl From<OrganizationRow> for OrganizationView {
    fn from(row: OrganizationRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            slug: row.slug,
            created_at: row.created_at,
        }
    }
}

/// A new organization.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CreateOrganization {
    /// 2 to 100 characters.
    #[schema(min_length = 2, max_length = 100)]
    pub name: Option<String>,
    /// 1 to 50 of `a-z`, `0-9` and `-`; made from the name when absent.
    #[schema(min_length = 1, max_length = 50, pattern = "^[a-z0-9-]+$")]
    pub slug: Option<String>,
}

/// A project.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProjectView {
    /// Its id.
    pub id: Uuid,
    /// Its organization.
    pub org_id: Uuid,
    /// Its name.
    pub name: String,
    /// Its unique short name.
    pub slug: String,
    /// Whether its keys open anything.
    pub status: ProjectStatus,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

impl From<ProjectRow> for ProjectView {
    fn from(row: ProjectRow) -> Self {
        Self {
            id: row.id,
            org_id: row.org_id,
            name: row.name,
            slug: row.slug,
            status: row.status,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// A new project.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreateProject {
    /// The organization that owns it.
    pub org_id: Option<Uuid>,
    /// 1 to 100 characters.
    #[schema(min_length = 1, max_length = 100)]
    pub name: Option<String>,
    /// 1 to 50 of `a-z`, `0-9` and `-`; made up when absent.
    #[schema(min_length = 1, max_length = 50, pattern = "^[a-z0-9-]+$")]
    pub slug: Option<String>,
}

/// A change to a project.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct UpdateProject {
    /// Its name from now on.
    #[schema(min_length = 1, max_length = 100)]
    pub name: Option<String>,
    /// `active` or `suspended`. To delete it, use DELETE.
    pub status: Option<ProjectStatus>,
}

/// A project is gone.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ProjectDeleted {
    /// Always true.
    pub deleted: bool,
}

/// A key without its secret.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyView {
    /// Its id.
    pub id: Uuid,
    /// The project it opens.
    pub project_id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// `live` or `test`.
    pub mode: String,
    /// The letters it begins with.
    pub prefix: String,
    /// The four letters it ends with.
    pub last_four: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last opened a request.
    pub last_used_at: Option<DateTime<Utc>>,
}

impl From<KeyRow> for KeyView {
    fn from(row: KeyRow) -> Self {
        Self {
            id: row.id,
            project_id: row.project_id,
            name: row.name,
            mode: row.environment,
            prefix: row.prefix,
            last_four: row.last_four,
            created_at: row.created_at,
            last_used_at: row.last_used_at,
        }
    }
}

/// A new key.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CreateKey {
    /// What to call it: up to 100 characters.
    #[schema(max_length = 100)]
    pub name: Option<String>,
    /// The one project it opens.
    #[schema(min_items = 1, max_items = 1)]
    pub scopes: Option<Vec<KeyScope>>,
    /// `live`, which it is when absent, or `test`.
    pub mode: Option<World>,
}

/// What a key opens.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyScope {
    /// Always `project`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The project.
    pub project_id: Uuid,
}

/// A new key, shown this once.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct KeyCreated {
    /// Its id.
    pub id: Uuid,
    /// The key itself. It is not stored and cannot be shown again.
    pub key: String,
    /// What its owner calls it.
    pub name: String,
    /// `live` or `test`.
    pub mode: String,
}

/// A key opens nothing any more.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct KeyRevoked {
    /// Always true.
    pub revoked: bool,
}

/// A provider's credential of a project.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SetCredential {
    /// The project; may stand in the query instead.
    pub project_id: Option<Uuid>,
    /// A known provider, or a name of one's own with a `baseUrl`.
    #[schema(min_length = 1, max_length = 64)]
    pub provider: Option<String>,
    /// The provider's key.
    #[schema(value_type = Option<String>, min_length = 1)]
    pub key: Option<SecretString>,
    /// What to call it.
    pub label: Option<String>,
    /// Where the provider is, when not at its usual place.
    pub base_url: Option<String>,
}

/// A provider's credential, masked.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialView {
    /// The provider.
    pub provider: String,
    /// Its key with the middle left out.
    pub masked_key: String,
    /// What it is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Where the provider is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// When it was set.
    pub updated_at: DateTime<Utc>,
}

impl From<CredentialRow> for CredentialView {
    fn from(row: CredentialRow) -> Self {
        Self {
            provider: row.provider,
            masked_key: row.masked_key,
            label: row.label,
            base_url: row.base_url,
            updated_at: row.updated_at,
        }
    }
}

/// A project's credentials. Wrapped in `data`, which is where the vendor's command-line client looks (contract 2.19).
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct CredentialList {
    /// By provider.
    pub data: Vec<CredentialView>,
}

/// Which organization.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct OrgQuery {
    /// Only of this organization.
    #[param(required = true)]
    pub org_id: Option<Uuid>,
}

/// Which project.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct ProjectQuery {
    /// Only of this project.
    pub project_id: Option<Uuid>,
}

fn slug_from(name: &str) -> Result<String, ApiError> {
    let words = name.to_ascii_lowercase();
    let words: Vec<&str> = words
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    let unique = random_letters()?;
    let mut slug: String = words.join("-").chars().take(40).collect();
    if !slug.is_empty() {
        slug.push('-');
    }
    slug.push_str(&unique);
    Ok(slug)
}

fn random_letters() -> Result<String, ApiError> {
    let secret = crate::seal::random_secret().map_err(|error| ApiError::Internal(error.into()))?;
    Ok(secret
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(8)
        .collect::<String>()
        .to_ascii_lowercase())
}

fn check_slug(slug: Option<String>, name: &str) -> Result<String, ApiError> {
    let Some(slug) = slug else {
        return slug_from(name);
    };
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=50).contains(&slug.len()) && slug.bytes().all(letters) {
        Ok(slug)
    } else {
        Err(ApiError::invalid(
            "slug",
            "`slug` must be 1 to 50 of `a-z`, `0-9` and `-`.",
        ))
    }
}

fn check_length(
    param: &str,
    text: Option<String>,
    least: usize,
    most: usize,
) -> Result<String, ApiError> {
    let text = text.unwrap_or_default();
    if (least..=most).contains(&text.trim().chars().count()) {
        Ok(text)
    } else {
        Err(ApiError::invalid(
            param,
            format!("`{param}` must be {least} to {most} characters."),
        ))
    }
}

/// List organizations.
#[utoipa::path(get, path = "/orgs", tag = "Platform", params(Page), security(("adminToken" = [])),
    responses((status = 200, description = "The organizations", body = Vec<OrganizationView>), (status = 400, description = "A parameter is wrong", body = ErrorBody)))]
pub async fn list_organizations(
    State(app): State<App>,
    Query(page): Query<Page>,
) -> Result<Listed<OrganizationView>, ApiError> {
    let size = page.size()?;
    let rows = app.db.organizations(page.after()?, size).await?;
    let views = rows.into_iter().map(OrganizationView::from).collect();
    Ok(Listed::new(
        views,
        size,
        "/v1/orgs",
        |org: &OrganizationView| org.id.to_string(),
    ))
}

/// Create an organization.
#[utoipa::path(post, path = "/orgs", tag = "Platform", request_body = CreateOrganization, security(("adminToken" = [])),
    responses(
        (status = 201, description = "The organization", body = OrganizationView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 409, description = "The slug is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_organization(
    State(app): State<App>,
    Json(new): Json<CreateOrganization>,
) -> Result<(StatusCode, Json<OrganizationView>), ApiError> {
    let name = check_length("name", new.name, 2, 100)?;
    let slug = check_slug(new.slug, &name)?;
    let row = app
        .db
        .create_organization(&name, &slug)
        .await
        .map_err(|error| taken(error, &slug))?;
    Ok((StatusCode::CREATED, Json(row.into())))
}

fn taken(error: StoreError, slug: &str) -> ApiError {
    if error.is_constraint("organizations_slug_key") || error.is_constraint("projects_slug_key") {
        ApiError::Conflict(format!("The slug \"{slug}\" is taken. Choose another."))
    } else {
        error.into()
    }
}

/// List an organization's projects.
#[utoipa::path(get, path = "/projects", tag = "Platform", params(OrgQuery, Page), security(("adminToken" = [])),
    responses((status = 200, description = "The projects", body = Vec<ProjectView>), (status = 400, description = "A parameter is wrong", body = ErrorBody)))]
pub async fn list_projects(
    State(app): State<App>,
    Query(query): Query<OrgQuery>,
    Query(page): Query<Page>,
) -> Result<Listed<ProjectView>, ApiError> {
    let org = query
        .org_id
        .ok_or_else(|| ApiError::invalid("orgId", "`orgId` is required."))?;
    let size = page.size()?;
    let rows = app.db.projects(Some(org), page.after()?, size).await?;
    let views = rows.into_iter().map(ProjectView::from).collect();
    Ok(Listed::new(
        views,
        size,
        &format!("/v1/projects?orgId={org}"),
        |project: &ProjectView| project.id.to_string(),
    ))
}

/// Create a project. It is active at once.
#[utoipa::path(post, path = "/projects", tag = "Platform", request_body = CreateProject, security(("adminToken" = [])),
    responses(
        (status = 201, description = "The project", body = ProjectView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such organization", body = ErrorBody),
        (status = 409, description = "The slug is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_project(
    State(app): State<App>,
    Json(new): Json<CreateProject>,
) -> Result<(StatusCode, Json<ProjectView>), ApiError> {
    let org = new
        .org_id
        .ok_or_else(|| ApiError::invalid("orgId", "`orgId` is required."))?;
    let name = check_length("name", new.name, 1, 100)?;
    let slug = check_slug(new.slug, &name)?;
    let row = app
        .db
        .create_project(org, &name, &slug)
        .await
        .map_err(|error| {
            if error.is_constraint("projects_org_fkey") {
                ApiError::missing("Organization", &org.to_string())
            } else {
                taken(error, &slug)
            }
        })?;
    Ok((StatusCode::CREATED, Json(row.into())))
}

/// Read a project.
#[utoipa::path(get, path = "/projects/{id}", tag = "Platform", params(("id" = String, Path, description = "The project")), security(("adminToken" = [])),
    responses((status = 200, description = "The project", body = ProjectView), (status = 404, description = "No such project", body = ErrorBody)))]
pub async fn read_project(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<ProjectView>, ApiError> {
    let row = app
        .db
        .project_row(parse("Project", &id)?)
        .await
        .map_err(|error| missing(error, "Project", &id))?;
    Ok(Json(row.into()))
}

/// Rename, suspend or reactivate a project.
#[utoipa::path(patch, path = "/projects/{id}", tag = "Platform", params(("id" = String, Path, description = "The project")), request_body = UpdateProject, security(("adminToken" = [])),
    responses(
        (status = 200, description = "The project", body = ProjectView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such project", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_project(
    State(app): State<App>,
    Path(id): Path<String>,
    Json(change): Json<UpdateProject>,
) -> Result<Json<ProjectView>, ApiError> {
    let project = parse("Project", &id)?;
    if change.status == Some(ProjectStatus::Deleted) {
        return Err(ApiError::invalid(
            "status",
            "`status` may be `active` or `suspended`. To delete the project, use DELETE.",
        ));
    }
    let name = change
        .name
        .map(|name| check_length("name", Some(name), 1, 100))
        .transpose()?;
    let row = app
        .db
        .update_project(project, name.as_deref(), change.status)
        .await
        .map_err(|error| missing(error, "Project", &id))?;
    Ok(Json(row.into()))
}

/// Delete a project and everything of it. There is no way back.
#[utoipa::path(delete, path = "/projects/{id}", tag = "Platform", params(("id" = String, Path, description = "The project")), security(("adminToken" = [])),
    responses((status = 200, description = "It is gone", body = ProjectDeleted), (status = 404, description = "No such project", body = ErrorBody)))]
pub async fn delete_project(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<ProjectDeleted>, ApiError> {
    app.db
        .purge_project(parse("Project", &id)?)
        .await
        .map_err(|error| missing(error, "Project", &id))?;
    Ok(Json(ProjectDeleted { deleted: true }))
}

/// List a project's keys, without their secrets.
#[utoipa::path(get, path = "/api-keys", tag = "Platform", params(ProjectQuery, Page), security(("adminToken" = [])),
    responses((status = 200, description = "The keys", body = Vec<KeyView>), (status = 400, description = "A parameter is wrong", body = ErrorBody)))]
pub async fn list_keys(
    State(app): State<App>,
    Query(query): Query<ProjectQuery>,
    Query(page): Query<Page>,
) -> Result<Listed<KeyView>, ApiError> {
    let project = query
        .project_id
        .ok_or_else(|| ApiError::invalid("projectId", "`projectId` is required."))?;
    let size = page.size()?;
    let rows = app.db.keys(project, page.after()?, size).await?;
    let views = rows.into_iter().map(KeyView::from).collect();
    Ok(Listed::new(
        views,
        size,
        &format!("/v1/api-keys?projectId={project}"),
        |key: &KeyView| key.id.to_string(),
    ))
}

/// Create a key. It is shown this once.
#[utoipa::path(post, path = "/api-keys", tag = "Platform", request_body = CreateKey, security(("adminToken" = [])),
    responses(
        (status = 201, description = "The key", body = KeyCreated),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such project", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_key(
    State(app): State<App>,
    Json(new): Json<CreateKey>,
) -> Result<(StatusCode, Json<KeyCreated>), ApiError> {
    let name = check_length(
        "name",
        Some(new.name.unwrap_or_else(|| "key".to_owned())),
        1,
        100,
    )?;
    let project = match new.scopes.as_deref() {
        Some([KeyScope { kind, project_id }]) if kind == "project" => *project_id,
        _ => {
            return Err(ApiError::invalid(
                "scopes",
                "`scopes` must be [{\"type\":\"project\",\"projectId\":…}].",
            ));
        }
    };
    let world = new.mode.unwrap_or(World::Live);
    let (row, key) = app
        .issue_key(project, &name, world)
        .await
        .map_err(|error| match error {
            StoreError::NotFound => ApiError::missing("Project", &project.to_string()),
            error => error.into(),
        })?;
    Ok((
        StatusCode::CREATED,
        Json(KeyCreated {
            id: row.id,
            key,
            name: row.name,
            mode: row.environment,
        }),
    ))
}

/// Revoke a key.
#[utoipa::path(delete, path = "/api-keys/{id}", tag = "Platform", params(("id" = String, Path, description = "The key's id")), security(("adminToken" = [])),
    responses((status = 200, description = "It opens nothing any more", body = KeyRevoked), (status = 404, description = "No such key", body = ErrorBody)))]
pub async fn revoke_key(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<KeyRevoked>, ApiError> {
    app.db
        .revoke_key(parse("Key", &id)?)
        .await
        .map_err(|error| missing(error, "Key", &id))?;
    Ok(Json(KeyRevoked { revoked: true }))
}

/// Set a project's own credential for a provider; it is used before the server's.
#[utoipa::path(post, path = "/byok", tag = "Platform", params(ProjectQuery), request_body = SetCredential, security(("adminToken" = [])),
    responses(
        (status = 201, description = "The credential, masked", body = CredentialView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such project", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn set_credential(
    State(app): State<App>,
    Query(query): Query<ProjectQuery>,
    Json(new): Json<SetCredential>,
) -> Result<(StatusCode, Json<CredentialView>), ApiError> {
    let project = named_project(new.project_id.or(query.project_id))?;
    let provider = new.provider.unwrap_or_default();
    super::agents::check_name("provider", &provider)?;
    let key = new
        .key
        .ok_or_else(|| ApiError::invalid("key", "`key` is required: the provider's API key."))?;
    app.providers
        .check(&provider, new.base_url.as_deref())
        .map_err(|sentence| ApiError::invalid("baseUrl", sentence))?;
    let (sealed_with, sealed_key) = app
        .seal_credential(project, &provider, &key)
        .map_err(|error| ApiError::Internal(error.into()))?;
    let credential = SealedCredential {
        provider,
        base_url: new.base_url,
        sealed_with,
        sealed_key,
    };
    let row = app
        .db
        .set_credential(project, &credential, new.label.as_deref(), &masked(&key))
        .await
        .map_err(|error| {
            if error.is_constraint("credentials_project_fkey") {
                ApiError::missing("Project", &project.to_string())
            } else {
                error.into()
            }
        })?;
    Ok((StatusCode::CREATED, Json(row.into())))
}

/// List a project's provider credentials, masked.
#[utoipa::path(get, path = "/byok", tag = "Platform", params(ProjectQuery), security(("adminToken" = [])),
    responses((status = 200, description = "The credentials", body = CredentialList), (status = 400, description = "A parameter is wrong", body = ErrorBody)))]
pub async fn list_credentials(
    State(app): State<App>,
    Query(query): Query<ProjectQuery>,
) -> Result<Json<CredentialList>, ApiError> {
    let rows = app.db.credentials(named_project(query.project_id)?).await?;
    Ok(Json(CredentialList {
        data: rows.into_iter().map(CredentialView::from).collect(),
    }))
}

/// Remove a project's credential for a provider.
#[utoipa::path(delete, path = "/byok/{provider}", tag = "Platform", params(("provider" = String, Path, description = "The provider"), ProjectQuery), security(("adminToken" = [])),
    responses((status = 200, description = "It is gone", body = super::agents::Removed), (status = 400, description = "A parameter is wrong", body = ErrorBody), (status = 404, description = "No such credential", body = ErrorBody)))]
pub async fn delete_credential(
    State(app): State<App>,
    Path(provider): Path<String>,
    Query(query): Query<ProjectQuery>,
) -> Result<Json<super::agents::Removed>, ApiError> {
    let project = named_project(query.project_id)?;
    app.db
        .delete_credential(project, &provider)
        .await
        .map_err(|error| missing(error, "Credential", &provider))?;
    Ok(Json(super::agents::Removed { removed: true }))
}

fn named_project(project: Option<Uuid>) -> Result<Uuid, ApiError> {
    project.ok_or_else(|| ApiError::invalid("projectId", "`projectId` is required."))
}

fn parse(what: &str, id: &str) -> Result<Uuid, ApiError> {
    id.parse().map_err(|_| ApiError::missing(what, id))
}

fn missing(error: StoreError, what: &str, id: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::missing(what, id),
        error => error.into(),
    }
}

-- Agents and the teams that group them. Every key leads with the project.

create table teams (
    project_id uuid not null,
    name text not null,
    description text,
    created_at timestamptz not null default clock_timestamp(),
    constraint teams_pkey primary key (project_id, name)
);

create table agents (
    project_id uuid not null,
    id uuid not null,
    name text not null,
    team text not null,
    definition jsonb not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (project_id, id),
    constraint agents_name_key unique (project_id, name),
    constraint agents_team_fkey foreign key (project_id, team) references teams (project_id, name) on update cascade
);

create index agents_by_team on agents (project_id, team, name);

create table changes (
    seq bigint generated always as identity primary key,
    project_id uuid not null,
    at timestamptz not null default clock_timestamp()
);

create index changes_by_time on changes (at);

"A server on 127.0.0.1 that speaks the few requests by which huggingface_hub makes a repository, commits files and fetches them."
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_owner"


class Repos:
    "Repositories as lists of commits, oldest first: (sha, path -> bytes)."
    def __init__(self): self.commits, self.gated, self.asked, self.down = {}, set(), [], False
    def commit(self, repo, files):
        old = self.commits.setdefault(repo, [])
        whole = {**(old[-1][1] if old else {}), **files}
        sha = hashlib.sha1(repr((repo, len(old), sorted(whole.items()))).encode()).hexdigest()
        old.append((sha, whole))
        return sha
    def at(self, repo, revision):
        "(sha, files) of a branch or commit, or None."
        commits = self.commits[repo] or [("0"*40, {})]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    do_HEAD = do_GET = do_POST = lambda self: self.serve()

    def reply(self, status, body=b"", **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def serve(self):
        repos, path = self.server.repos, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repos.asked.append((self.command, path))
        if repos.down: return self.reply(503)
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not self.known and path != "/api/validate-yaml": return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create": return self.create(json.loads(body))
        if path == "/api/validate-yaml": return self.validate(json.loads(body)["content"])
        for pattern, act in ((r"/api/models/(.+)/preupload/(.+)", self.preupload), (r"/api/models/(.+)/commit/(.+)", self.commit), (r"/api/models/(.+)/tree/([^/]+)", self.tree),
                             (r"/api/models/(.+)/revision/(.+)", self.info), (r"/api/models/([^/]+/[^/]+)()", self.info), (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve)):
            if found := re.fullmatch(pattern, path): return self.in_repo(act, body, *found.groups())
        self.reply(404)

    def in_repo(self, act, body, repo, revision, *rest):
        repos = self.server.repos
        if repo not in repos.commits: return self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if repo in repos.gated and not self.known: return self.reply(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        at = repos.at(repo, revision or "main")
        if at is None: return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        act(repo, at, body, *rest)

    def create(self, want):
        repo = f"{want.get('organization') or 'owner'}/{want['name']}"
        there = repo in self.server.repos.commits
        self.server.repos.commits.setdefault(repo, [])
        self.reply(409 if there else 200, {"url": f"{self.server.url}/{repo}", "name": repo, "error": "You already created this model repo"})

    def validate(self, content):
        import yaml
        meta = yaml.safe_load(content.split("---")[1])
        good = meta.get("license", "mit") in ("mit", "apache-2.0")
        self.reply(200 if good else 400, {"warnings": [], "errors": [] if good else [{"message": '"license" must be one of the known ones'}]})

    def preupload(self, repo, at, body): self.reply(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})

    def commit(self, repo, at, body):
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        sha = self.server.repos.commit(repo, files)
        self.reply(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def tree(self, repo, at, body): self.reply(200, [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in at[1].items()])
    def info(self, repo, at, body): self.reply(200, {"id": repo, "modelId": repo, "sha": at[0], "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": n} for n in at[1]]})

    def resolve(self, repo, at, body, name):
        sha, files = at
        if name not in files: return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=sha)
        self.reply(200, files[name], X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')


@contextmanager
def serving():
    "The server, as `repos` with its `url`; it ends with the block."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.repos, server.url = True, Repos(), f"http://127.0.0.1:{server.server_port}"
    server.repos.url = server.url
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True)
    thread.start()
    try: yield server.repos
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

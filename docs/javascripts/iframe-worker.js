// The search of pages that are opened from a folder. Browsers start no worker from file://, so the worker's script runs
// in a hidden frame instead. The theme looks for the name IFrameWorker.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.target = frame.contentWindow
      this.ready = new Promise((resolve) => frame.addEventListener("load", resolve))
      addEventListener("message", (event) => {
        if (event.source === this.target) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      const page = this.target.document
      page.open()
      page.write(`<script>
        window.postMessage = (data) => parent.dispatchEvent(new MessageEvent("message", { data, source: window }))
        window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((resolve) => {
          const script = document.createElement("script")
          script.onload = resolve
          script.src = url
          document.body.append(script)
        })), Promise.resolve())
      <\/script><script src="${new URL(url, location.href)}"><\/script>`)
      page.close()
    }

    postMessage(data) {
      this.ready.then(() => this.target.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {}
  }
  window.Worker = window.IFrameWorker
}

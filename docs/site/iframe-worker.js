// Browsers start no workers from files that are opened without a web server (file://). The search of the theme needs one:
// this class runs the script of a worker in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = `<script>
        window.postMessage = data => parent.dispatchEvent(new MessageEvent("frame-message", { data }))
        window.importScripts = (...urls) => Promise.all(urls.map(url => new Promise((resolve, reject) => {
          const script = document.createElement("script")
          Object.assign(script, { src: url, onload: resolve, onerror: reject })
          document.head.append(script)
        })))
      </` + `script><script src="${url}"></` + `script>`
      this.frame.onload = () => {
        for (const data of this.waiting.splice(0)) this.deliver(data)
        this.waiting = undefined
      }
      addEventListener("frame-message", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })))
      document.documentElement.append(this.frame)
    }
    deliver(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }
    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.deliver(data)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
